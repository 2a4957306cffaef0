"""Pack a model into a small file from which it can be restored exactly.

Takes weights (dense, pruned, qmodel) and int8 TorchScript files. Every script that takes weights also
takes packed files. float32 and int8 come back bit for bit; float16 is rounded once.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from utils.checkpoints.weights import Weights
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.files import BYTES_PER_MB, atomic_write, file_size_mb
from utils.open_model import ModelFile, open_model
from utils.packing.format import PackedFile, is_packed
from utils.packing.pack import DTYPES, Source, check_same, encode, format_sizes, packed_sizes
from utils.quantization.int8_model import Int8Model

CHECK_IMAGES = 8


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="weights (.pth) or an int8 TorchScript file (.pt)")
    parser.add_argument("--o", required=True, metavar="FILE", help="packed file to write")
    cli.add_force_argument(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="float16 rounds float weights and halves their size; int8 is for files that are int8 already "
        "(default: the type of the input file)",
    )
    return parser


def source_of(file: ModelFile, dtype: str | None) -> tuple[Source, str]:
    """Return what to pack from a file, and as which type.

    Args:
        file: a file of any kind.
        dtype: --dtype; None for the type of the file.

    Raises:
        UserError: the file cannot be packed in this type.
    """
    path, source = file.path, file.source
    if isinstance(source, Weights):
        if dtype == "int8":
            raise UserError(
                f"{path} holds float weights: quantize them with post_training_quantization.py or "
                "quantization_aware_training.py, then pack the .pt file that it writes"
            )
        return source, dtype or (PackedFile(path).header["dtype"] if is_packed(path) else "float32")
    if not isinstance(source, Int8Model):
        raise UserError(
            f"{path} is a float TorchScript file, whose batch norms are gone: pack the weights (.pth) "
            "that it was made from"
        )
    if dtype not in (None, "int8"):
        raise UserError(
            f"{path} is int8, which --dtype {dtype} cannot undo: leave --dtype out, or pack the weights "
            "(.pth) that it was made from"
        )
    return (source, file.metadata), "int8"


@torch.inference_mode()
def check_logits(file: ModelFile, packed: ModelFile) -> None:
    """Make sure that the packed model gives the same logits on a few random images.

    Raises:
        RuntimeError: it does not.
    """
    side = file.metadata.image_size
    images = torch.randn(CHECK_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    file.use_engine()
    if not torch.equal(file.model(images), packed.model(images)):
        raise RuntimeError(f"{packed.path}: the logits are not those of the model that was packed")


def main(args: argparse.Namespace) -> None:
    """Pack, read back and compare; the file is kept only if everything is equal."""
    runtime.check_outputs(args, "o")
    file = open_model(args.weights)
    source, dtype = source_of(file, args.dtype)
    before = file_size_mb(args.weights)
    content = encode(source, dtype)
    with atomic_write(args.o) as temporary:
        temporary.write_bytes(content)
        found = check_same(temporary, source, dtype)
        if dtype == "int8":
            check_logits(file, open_model(temporary))
            found += f", logits of {CHECK_IMAGES} random images are equal"
    print(format_sizes(packed_sizes(args.o)))
    after = len(content) / BYTES_PER_MB
    print(f"checked: {found}")
    print(f"size {before:.3f} MB -> {after:.3f} MB, ratio {before / after:.2f}×")
    print(f"wrote {args.o} ({after:.3f} MB, {dtype})")


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
