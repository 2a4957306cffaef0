"""Open a model from any file: weights, a qmodel, TorchScript, or a packed file."""

import os
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from models import MobileNetV2
from models.statistics import model_statistics
from utils.checkpoints.metadata import Metadata
from utils.checkpoints.weights import (
    ALL_KINDS,
    MOBILENETV2_KINDS,
    Weights,
    check_classes,
    choose_normalization,
    is_torchscript,
    normalization_for,
)
from utils.common.devices import choose_device
from utils.common.errors import UserError
from utils.common.files import check_input
from utils.data.datasets import ImageData, Normalization
from utils.deployment.torchscript import to_torchscript
from utils.deployment.torchscript_reader import read_torchscript
from utils.open_weights import open_weights
from utils.packing.int8_weights import is_packed_int8, read_int8
from utils.quantization import eager
from utils.quantization.int8_model import Int8Model
from utils.training.distillation import Ensemble


@dataclass(frozen=True)
class ModelFile:
    """A model that is ready to run, and what its file says about it.

    Args:
        path: the file.
        metadata: metadata of the model.
        model: in eval mode; maps normalized images (N, 3, H, W) to logits (N, classes).
        source: what the model was built from: weights, int8 tensors, or a float model with its batch
            norms folded.
    """

    path: Path
    metadata: Metadata
    model: nn.Module
    source: Weights | Int8Model | MobileNetV2

    def use_engine(self) -> None:
        """Select the quantization engine that an int8 model was made for; do nothing for a float model."""
        if self.metadata.engine is not None:
            eager.use_engine(self.metadata.engine)

    def with_normalization(self, given: Normalization | None) -> "ModelFile":
        """Return the model file with a normalization, its own or the given one.

        Raises:
            UserError: it has none and none is given, or the two differ.
        """
        chosen = choose_normalization(self.path, self.metadata.normalization, given)
        if chosen is None:
            raise UserError(f"{self.path} does not say its normalization: give --normalization")
        return replace(self, metadata=replace(self.metadata, normalization=chosen))

    def fit(self, data: ImageData) -> Normalization:
        """Check that the data set has the classes of the model, and return the normalization to use.

        Raises:
            UserError: the number of classes or their names differ.
        """
        classes = self.metadata.architecture["num_classes"]
        check_classes(self.path, self.metadata.class_names, classes, data)
        return normalization_for(self.path, self.metadata.normalization, data)


def open_model(
    path: str | os.PathLike,
    output_stride: int | None = None,
    kinds: tuple[str, ...] = MOBILENETV2_KINDS,
) -> ModelFile:
    """Open a file of any kind that this project writes, or a bare state_dict.

    Args:
        path: the file.
        output_stride: overrides the one in the file, unless that is fixed.
        kinds: the kinds of weights that the caller accepts, as for `open_weights`; TorchScript and
            packed int8 files are always accepted.

    Raises:
        UserError: the file is missing, damaged or foreign, its engine is not supported here, or its
            output stride is fixed but another one was given.
    """
    path = check_input(path, "model file")
    read = read_int8 if is_packed_int8(path) else read_torchscript if is_torchscript(path) else None
    if read is None:
        weights = open_weights(path, kinds, output_stride)
        return ModelFile(path, metadata_of(weights), weights.model, weights)
    if output_stride is not None:
        raise UserError(
            f"{path} is int8 or TorchScript, its output stride is fixed: leave --output_stride out"
        )
    source, metadata = read(path)
    if isinstance(source, Int8Model):
        tensors = [*source.weights.values(), *source.biases.values()]
    else:
        tensors = list(source.parameters())
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError(f"{path} holds NaN or infinity: write or fetch it again")
    if sum(tensor.numel() for tensor in tensors) != metadata.parameters:
        raise UserError(f"{path} is damaged (not {metadata.parameters} parameters): write or fetch it again")
    supported = eager.supported_engines()
    if metadata.engine not in (None, *supported):
        raise UserError(
            f"{path} was made for the quantization engine {metadata.engine}, which this machine does not "
            f"support (it supports {', '.join(supported)}): make it again with --backend"
        )
    with eager.engine(metadata.engine):
        return ModelFile(path, metadata, to_torchscript(source, metadata.image_size), source)


def device_for(file: ModelFile, args: Namespace) -> torch.device:
    """Return where the model can run: weights anywhere, TorchScript on the CPU that it is made for.

    Raises:
        UserError: --device names another, or one that is not there.
    """
    if is_torchscript(file.path):
        if args.device not in ("auto", "cpu"):
            raise UserError(
                f"{file.path} is TorchScript, which is made for the CPU: leave --device {args.device} out"
            )
        args.device = "cpu"
    return choose_device(args)


def metadata_of(weights: Weights) -> Metadata:
    """Return the metadata of weights, with the statistics of their model."""
    statistics = model_statistics(weights.model, weights.image_size)
    return Metadata(
        variant=weights.kind,
        engine=None,
        architecture=weights.model.architecture,
        class_names=weights.class_names,
        normalization=weights.normalization,
        image_size=weights.image_size,
        parameters=statistics.parameters,
        nonzeros=statistics.nonzeros,
        macs=statistics.macs,
        dense_size_mb=statistics.dense_size_mb,
        nonzero_size_mb=statistics.nonzero_size_mb,
        metrics=weights.metrics,
    )


def open_teacher(paths: list[str] | None, student: Weights, device: torch.device) -> Ensemble | None:
    """Open the files of --teacher as one model in eval mode; return None if there are none.

    Args:
        paths: files of any kind that hold a model. An int8 model is much faster than the float model it
            was made from, and gives nearly the same outputs.
        student: the model to train, with its class names and normalization.
        device: the device of both.

    Raises:
        UserError: a file holds no model, its classes or normalization differ from the student's, or it
            is int8 and the device is not the CPU.
    """
    if not paths:
        return None
    return Ensemble(_open_member(path, student, device) for path in paths).eval()


def _open_member(path: str, student: Weights, device: torch.device) -> nn.Module:
    teacher = open_model(path, kinds=ALL_KINDS)
    known = teacher.metadata
    classes = known.architecture["num_classes"], student.model.architecture["num_classes"]
    if classes[0] != classes[1] or known.class_names not in (None, student.class_names):
        raise UserError(f"--teacher {path} has other classes than the model: give one of the same data set")
    if known.normalization not in (None, student.normalization):
        raise UserError(
            f"--teacher {path} was trained with another normalization than the model: "
            "give one of the same data set and --val_size"
        )
    if known.engine is not None and device.type != "cpu":
        raise UserError(f"--teacher {path} is int8, which runs only on a CPU: give float weights")
    return teacher.model.to(device).to(memory_format=torch.channels_last)
