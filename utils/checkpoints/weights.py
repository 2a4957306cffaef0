"""The format of weights files, written and read with checks."""

import io
import os
import sys
import warnings
import zipfile
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import MobileNetV2, MobileNetV2Quantization, ResNet18
from models.mobilenetv2 import OUTPUT_STRIDES
from utils.checkpoints.foreign import architecture_of, unwrap
from utils.checkpoints.metadata import (
    check_architecture,
    check_image_size,
    check_metrics,
    parse_class_names,
    parse_normalization,
    shown,
)
from utils.checkpoints.pickles import NAMES_OF_TENSORS, NotPlainError, check_pickle
from utils.common.errors import UserError, one_line
from utils.common.files import save_torch
from utils.common.runtime import plain, versions
from utils.data.datasets import DEFAULT_IMAGE_SIZE, ImageData, Normalization, measure_normalization

FORMAT = "mobilenetv2-weights"
FORMAT_VERSION = 1
MODEL_CLASSES = {"float": MobileNetV2, "qmodel": MobileNetV2Quantization, "resnet18": ResNet18}
DESCRIPTIONS = {
    "float": "float weights (dense or pruned)",
    "qmodel": "a qmodel (written by scripts/to_qmodel_weights.py)",
    "resnet18": "a ResNet-18 (written by train.py --model resnet18)",
}
MOBILENETV2_KINDS = ("float", "qmodel")
ALL_KINDS = tuple(MODEL_CLASSES)
PICKLES_OF_OLD_FORMAT = 5
"""A magic number, the version, the system, the content, and the names of the storages."""


@dataclass
class Weights:
    """A model and the metadata needed to use it.

    `kind` is "float" (MobileNetV2, dense or pruned), "qmodel" (MobileNetV2Quantization, still float,
    ready to be quantized) or "resnet18" (ResNet18, a teacher). A bare state_dict comes without class
    names and normalization.
    """

    model: Any  # an instance of MODEL_CLASSES[kind]
    kind: str = "float"
    class_names: tuple[str, ...] | None = None
    normalization: Normalization | None = None
    image_size: int = DEFAULT_IMAGE_SIZE
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class CompleteWeights(Weights):
    """Weights with class names and normalization, ready to run on images."""

    class_names: tuple[str, ...]
    normalization: Normalization


def save_weights(path: str | os.PathLike, weights: Weights, args: Namespace) -> None:
    """Write weights, architecture, class names, normalization, metrics, arguments and versions.

    Raises:
        UserError: what was written cannot be read back (weights that are not finite, a full disk); a file
            that stood there before is whole.
    """
    normalization = weights.normalization
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": weights.kind,
        "architecture": weights.model.architecture,
        "state_dict": weights.model.state_dict(),
        "class_names": plain(weights.class_names),
        "normalization": plain(asdict(normalization)) if normalization else None,
        "image_size": weights.image_size,
        "metrics": plain(weights.metrics),
        "arguments": plain(args),
        "versions": versions(),
    }

    def read_back(temporary: Path) -> None:
        try:
            weights_from_content(Path(path), read_pickle(temporary), weights.kind, None)
        except UserError as error:
            raise UserError(f"{error}; it is not written") from error

    save_torch(path, content, read_back)


def weights_from_content(
    path: Path, content: dict[str, Any], kinds: str | tuple[str, ...], output_stride: int | None
) -> Weights:
    """Build a model from the content of a weights file.

    Args:
        path: the file, for messages.
        content: what `save_weights` wrote, or a bare state_dict of torchvision's MobileNetV2.
        kinds: the kind or kinds that the caller accepts, keys of MODEL_CLASSES.
        output_stride: overrides the one in the file; the weights do not depend on it.

    Raises:
        UserError: the content is not weights, is of another kind, or does not fit the architecture.
    """
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    wanted = " or ".join(DESCRIPTIONS[kind] for kind in kinds)
    is_bare = "format" not in content
    notes: list[str] = []
    if not is_bare and (not isinstance(content["format"], str) or content["format"] != FORMAT):
        raise UserError(
            f"{path} has the format {shown(content['format'])}, not that of weights: to get weights from the "
            "checkpoint of an unfinished run, resume the run and let it finish"
        )
    if is_bare:
        state, notes = unwrap(path, content)
        content = {"kind": "float", "architecture": architecture_of(path, state), "state_dict": state}
        content["format_version"] = FORMAT_VERSION
        if kinds == ("qmodel",):
            raise UserError(f"{path} is a bare state_dict, {wanted} is wanted here: convert it first")
    version, found = content.get("format_version"), content.get("kind")
    if type(version) is not int or version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {shown(version)}, this program reads "
            f"{FORMAT_VERSION}: use the release that wrote it"
        )
    if not isinstance(found, str) or found not in DESCRIPTIONS:
        raise UserError(f"{path} is of the unknown kind {shown(found)}: use the release that wrote it")
    if found not in kinds:
        raise UserError(f"{path} is {DESCRIPTIONS[found]}, {wanted} is wanted here")
    weights = _rebuild(path, content, output_stride)
    if is_bare and output_stride is None:
        stride = weights.model.architecture["output_stride"]
        notes.append(
            f"a bare state_dict does not say its output stride: {stride} is assumed (--output_stride)"
        )
    if notes:
        print(f"note: {path}: {'; '.join(notes)}", file=sys.stderr)
    return weights


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file of torch.save, without running code that it may contain."""
    if is_torchscript(path):
        raise UserError(f"{path} is a TorchScript file: weights (.pth) are wanted here")
    if path.suffix == ".onnx":
        raise UserError(f"{path} is an ONNX file: give the weights (.pth) that it was made from")
    try:
        _check_before_loading(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except NotPlainError as error:
        raise UserError(
            f"{path} contains more than dense tensors and plain values and is not opened, because it "
            "could run code: save its state_dict instead"
        ) from error
    except Exception as error:
        # torch.load raises whatever the broken part raises: zip, pickle, unicode, key errors.
        raise UserError(
            f"{path} is truncated, damaged or not a weights file: write or download it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights: save a state_dict")
    # torch.load does not verify checksums. Foreign files may have been written without them.
    if "format" in content and _is_damaged(path):
        raise UserError(f"{path} is damaged (a checksum is wrong): write or download it again")
    return content


def _check_before_loading(path: Path) -> None:
    """Check what torch.load would unpack and unpickle.

    Raises:
        UserError: the file is a compressed archive.
        NotPlainError: it names other classes or functions than those of dense tensors.
        ValueError, ...: it is damaged.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(PICKLES_OF_OLD_FORMAT):
                check_pickle(file, NAMES_OF_TENSORS)
            return
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise UserError(f"{path} is a compressed archive, which torch.save does not write: save it again")
        names = archive.namelist()
        # torch ignores case. With two members of one name, it could read the other one.
        if len({name.lower() for name in names}) < len(names):
            raise ValueError("two members have the same name")
        (name,) = [name for name in names if name.endswith("/data.pkl")]
        check_pickle(io.BytesIO(archive.read(name)), NAMES_OF_TENSORS)


def _is_damaged(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except Exception:
        return True


def is_torchscript(path: Path) -> bool:
    """Return whether a file is an archive of torch.jit.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:
        # Damaged archives raise many kinds of errors; whoever reads the file reports them.
        return False
    return any("/code/" in name for name in names) and any(n.endswith("constants.pkl") for n in names)


def check_classes(
    path: str | os.PathLike, class_names: tuple[str, ...] | None, num_classes: int, data: ImageData
) -> None:
    """Check that a model and a data set have the same classes.

    Raises:
        UserError: the number of classes or their names differ.
    """
    if num_classes != len(data.class_names):
        raise UserError(
            f"{path} has {num_classes} classes, the images have {len(data.class_names)}: "
            "give the data set that it was trained on"
        )
    if class_names is not None and class_names != data.class_names:
        pairs = zip(class_names, data.class_names, strict=True)
        label, (ours, theirs) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        raise UserError(
            f"{path} has {ours!r:.80} as class {label}, the images have {theirs!r:.80}: "
            "give the data set that it was trained on"
        )


def choose_normalization(
    path: str | os.PathLike, own: Normalization | None, given: Normalization | None
) -> Normalization | None:
    """Return the normalization of a file, or else that of --normalization; None if neither is known.

    Raises:
        UserError: --normalization differs from that of the file.
    """
    if None not in (own, given) and own != given:
        raise UserError(f"{path} has another normalization than --normalization: leave that out")
    return own or given


def normalization_for(path: str | os.PathLike, own: Normalization | None, data: ImageData) -> Normalization:
    """Return what `choose_normalization` does, or else that of the training images, with a note.

    Raises:
        UserError: as `choose_normalization`.
    """
    chosen = choose_normalization(path, own, data.normalization)
    if chosen is None:
        print(
            f"note: {path} does not say its normalization: that of the training images is assumed "
            "(--normalization)",
            file=sys.stderr,
        )
    return chosen or measure_normalization(data)


def complete(path: str | os.PathLike, weights: Weights, data: ImageData) -> CompleteWeights:
    """Check weights against the data set and return them with all metadata.

    Class names, a missing normalization and the image size are taken from the data set.

    Raises:
        UserError: as `check_classes`.
    """
    check_classes(path, weights.class_names, weights.model.architecture["num_classes"], data)
    return CompleteWeights(
        model=weights.model,
        kind=weights.kind,
        class_names=data.class_names,
        normalization=normalization_for(path, weights.normalization, data),
        image_size=data.test.images.shape[-1],
        metrics=weights.metrics,
    )


def _rebuild(path: Path, content: dict[str, Any], output_stride: int | None) -> Weights:
    try:
        check_architecture(content["architecture"])
        check_metrics(content.get("metrics", {}))
        architecture = dict(content["architecture"])
        if output_stride is not None:
            architecture["output_stride"] = output_stride
        # On "meta" nothing is allocated.
        with torch.device("meta"):
            model: nn.Module = MODEL_CLASSES[content["kind"]](**architecture)
        model.load_state_dict(_checked_state(content["state_dict"], model.state_dict()), assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        names, normalization = content.get("class_names"), content.get("normalization")
        weights = Weights(
            model=model.eval(),
            kind=content["kind"],
            class_names=None if names is None else parse_class_names(names, architecture["num_classes"]),
            normalization=None if normalization is None else parse_normalization(normalization),
            image_size=content.get("image_size", DEFAULT_IMAGE_SIZE),
            metrics=content.get("metrics", {}),
        )
        check_image_size(weights.image_size)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        model_name = MODEL_CLASSES[content["kind"]].__name__
        raise UserError(f"{path} does not fit {model_name} ({one_line(error)[:200]})") from error
    for name, value in model.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{path} holds NaN or infinity in {name}: the training diverged")
        if name.endswith("running_var") and (value < 0).any():
            raise UserError(f"{path} holds a negative variance in {name}: it is damaged")
    return weights


def _checked_state(state: Any, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors of a file, which may share memory there.

    Raises:
        ValueError: a name, type or shape differs, or a tensor is larger than its memory in the file.
    """
    if not isinstance(state, dict):
        raise ValueError(f"its state_dict is a {type(state).__name__}")
    for name in state.keys() ^ expected.keys():
        raise ValueError(f"{shown(name)} is {'unknown' if name in state else 'missing'}")
    for name, wanted in expected.items():
        found = state[name]
        if not isinstance(found, Tensor):
            raise ValueError(f"{name} is a {type(found).__name__}")
        if (found.dtype, found.layout, found.device.type) != (wanted.dtype, wanted.layout, "cpu"):
            raise ValueError(f"{name} is {found.dtype} ({found.layout}, {found.device}), not {wanted.dtype}")
        if found.shape != wanted.shape:
            raise ValueError(f"{name} has the shape {list(found.shape)}, not {list(wanted.shape)}")
        if found.untyped_storage().nbytes() < found.numel() * found.element_size():
            raise ValueError(f"{name} is larger than its memory in the file")
    return {name: value.detach().clone() for name, value in state.items()}


def add_output_stride_argument(parser: ArgumentParser) -> None:
    """Add --output_stride, to run a model at another stride than its file says, or if it says none."""
    parser.add_argument(
        "--output_stride",
        type=int,
        choices=sorted(OUTPUT_STRIDES),
        help="output stride to run the model at (default: as in the weights file; 16 for a bare state_dict)",
    )
