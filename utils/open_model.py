"""Opening a file of any kind that holds a model: float or pruned weights, a qmodel, TorchScript, packed."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.statistics import model_statistics
from utils.checkpoints.weights import (
    ALL_KINDS,
    MOBILENETV2_KINDS,
    Weights,
    check_classes,
    is_torchscript,
    load_weights,
)
from utils.common.errors import UserError
from utils.common.files import check_input
from utils.data.datasets import ImageData, Normalization, measure_normalization
from utils.deployment.torchscript import load_torchscript
from utils.packing.int8_weights import is_packed_int8, load_int8
from utils.quantization import eager as quantization
from utils.training.distillation import Ensemble


@dataclass(frozen=True)
class ModelFile:
    """A model that is ready to run, and what its file says about it.

    Args:
        path: where it was read.
        variant: the kind of weights, or the variant that a TorchScript file names.
        model: in eval mode; maps normalized images (N, 3, H, W) to logits (N, classes).
        architecture: the arguments of the model's class.
        class_names: None if the file carries none, as a bare state_dict.
        normalization: None if the file carries none.
        image_size: side in pixels of the images that it was trained on, and MACs are counted for.
        engine: the quantization engine that an int8 model was made for.
        parameters: weights and biases, and batch-norm parameters where they are not folded.
        nonzeros: those of them that are not zero.
        macs: multiply-adds of an image.
        dense_size_mb: MB of all parameters at their precision.
        nonzero_size_mb: MB of the nonzero ones, without any index.
    """

    path: Path
    variant: str
    model: nn.Module
    architecture: dict[str, Any]
    class_names: tuple[str, ...] | None
    normalization: Normalization | None
    image_size: int
    engine: str | None
    parameters: int
    nonzeros: int
    macs: int
    dense_size_mb: float
    nonzero_size_mb: float

    @property
    def density(self) -> float:
        """Fraction of the parameters that are not zero."""
        return self.nonzeros / self.parameters

    def use_engine(self) -> None:
        """Let the engine that the model was made for run what comes next; a float model has none."""
        if self.engine is not None:
            quantization.use_engine(self.engine)

    def fit(self, data: ImageData) -> Normalization:
        """Check the classes against those of the images; the normalization to give the model.

        Raises:
            UserError: the number of classes or their names differ.
        """
        check_classes(self.path, self.class_names, self.architecture["num_classes"], data)
        return self.normalization or measure_normalization(data)


def open_model(
    path: str | os.PathLike,
    output_stride: int | None = None,
    kinds: tuple[str, ...] = MOBILENETV2_KINDS,
) -> ModelFile:
    """Open a file of any kind that this project writes, or a bare state_dict.

    Args:
        path: the file.
        output_stride: instead of the file's own, where it is not fixed.
        kinds: of weights that the caller takes, as `load_weights`; TorchScript and packed int8 files
            are always taken.

    Raises:
        UserError: the file is missing, broken or foreign, its engine is not supported here, or its
            output stride is fixed.
    """
    path = check_input(path, "model file")
    load_scripted = load_int8 if is_packed_int8(path) else load_torchscript if is_torchscript(path) else None
    if load_scripted is not None:
        if output_stride is not None:
            raise UserError(
                f"{path} is int8 or TorchScript, its output stride is fixed: leave --output_stride out"
            )
        model, metadata = load_scripted(path)
        kept = {f.name: getattr(metadata, f.name) for f in fields(ModelFile) if hasattr(metadata, f.name)}
        return ModelFile(path=path, model=model.eval(), **kept)
    weights = load_weights(path, kinds, output_stride)
    statistics = model_statistics(weights.model, weights.image_size)
    return ModelFile(
        path=path,
        variant=weights.kind,
        model=weights.model,
        architecture=weights.model.architecture,
        class_names=weights.class_names,
        normalization=weights.normalization,
        image_size=weights.image_size,
        engine=None,
        parameters=statistics.parameters,
        nonzeros=statistics.nonzeros,
        macs=statistics.macs,
        dense_size_mb=statistics.dense_size_mb,
        nonzero_size_mb=statistics.nonzero_size_mb,
    )


def open_teacher(paths: list[str] | None, student: Weights, device: torch.device) -> Ensemble | None:
    """Open the files of --teacher as one model in eval mode, or return None if there are none.

    Args:
        paths: any files that hold a model. An int8 model answers much faster than the float model it
            was made from, and nearly the same.
        student: the model to train, with its class names and its normalization.
        device: where both run.

    Raises:
        UserError: a file holds no model, its classes or its normalization differ from the student's,
            or it is int8 and the device is not the CPU.
    """
    if not paths:
        return None
    return Ensemble(_open_member(path, student, device) for path in paths).eval()


def _open_member(path: str, student: Weights, device: torch.device) -> nn.Module:
    teacher = open_model(path, kinds=ALL_KINDS)
    classes = teacher.architecture["num_classes"], student.model.architecture["num_classes"]
    if classes[0] != classes[1] or teacher.class_names not in (None, student.class_names):
        raise UserError(f"--teacher {path} knows other classes than the model: give one of the same data set")
    if teacher.normalization not in (None, student.normalization):
        raise UserError(
            f"--teacher {path} was trained with another normalization than the model: "
            "give one of the same data set and --val_size"
        )
    if teacher.engine is not None and device.type != "cpu":
        raise UserError(f"--teacher {path} is int8, which runs on a CPU alone: give float weights")
    return teacher.model.to(device, memory_format=torch.channels_last)
