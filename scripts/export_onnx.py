"""Export a model of any kind to ONNX and check its logits on test images.

Float and pruned weights become a float model. Int8 files become a quantized model (QDQ) with exactly the
same int8 weights, scales and zero points, so that ONNX Runtime or OpenVINO run what was evaluated here. If
the logits differ by more than rounding explains, nothing is written.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models.folding import fold_batch_norms
from utils.checkpoints.weights import Weights, add_output_stride_argument
from utils.common import cli, errors, runtime
from utils.common.errors import UserError
from utils.common.files import atomic_write, file_size_mb
from utils.common.optional_packages import import_optional
from utils.data.datasets import ImageData, load_data
from utils.data.loader import Loader
from utils.deployment.onnx import check_logits, start_session, to_onnx
from utils.open_model import ModelFile, open_model
from utils.quantization.int8_model import Int8Model

CHECK_BATCH_SIZE = 100


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.ArgumentParser(__doc__)
    parser.add_argument("--weights", required=True, help="file of any kind that this project writes")
    parser.add_argument("--o", required=True, metavar="FILE", help="ONNX file to write")
    cli.add_force_argument(parser)
    add_output_stride_argument(parser)
    parser.add_argument(
        "--batch_size",
        type=cli.positive_int,
        help="fixed number of images per batch (default: any number)",
    )
    parser.add_argument(
        "--num_check_images",
        type=cli.positive_int,
        default=256,
        help="number of test images to compare the logits on",
    )
    cli.add_data_arguments(parser)
    cli.add_runtime_arguments(parser)
    return parser


def check_batches(file: ModelFile, data: ImageData, args: argparse.Namespace) -> Loader:
    """Return --num_check_images test images, or all of them; only whole batches if --batch_size is given.

    Raises:
        UserError: the test split is smaller than one batch.
    """
    split, batch_size = data.split("test"), args.batch_size or CHECK_BATCH_SIZE
    if args.batch_size is None:
        # The last batch is usually smaller, which checks that any batch size works.
        split = split.subset(torch.arange(min(args.num_check_images, len(split))))
    elif batch_size > len(split):
        raise UserError(
            f"--batch_size {args.batch_size} is more than the {len(split)} test images, on which the file "
            "is checked: give a smaller one"
        )
    limit = -(-args.num_check_images // batch_size)
    return Loader(split, file.fit(data), batch_size, drop_last=args.batch_size is not None, limit=limit)


def main(args: argparse.Namespace) -> None:
    """Convert, check, write."""
    runtime.set_up(args.seed, args.threads)
    import_optional("onnx", "onnxruntime")
    runtime.check_outputs(args, "o")
    file = open_model(args.weights, args.output_stride)
    data = load_data(args, file.metadata.image_size)
    batches = check_batches(file, data, args)
    metadata = replace(
        file.metadata,
        class_names=data.class_names,
        normalization=batches.normalization,
        image_size=data.test.images.shape[-1],
    )
    source = file.source
    if isinstance(source, Weights):
        source = fold_batch_norms(source.model)
    step = source.activations[source.operations[-1].name].scale if isinstance(source, Int8Model) else None
    content = to_onnx(source, metadata, args.batch_size).SerializeToString(deterministic=True)
    file.use_engine()
    session = start_session(content, torch.get_num_threads())
    with torch.inference_mode():
        pairs = [(file.model(images), session(images)) for images, _ in batches]
    ours, theirs = map(torch.cat, zip(*pairs, strict=True))
    print(check_logits(args.o, ours, theirs, step))
    with atomic_write(args.o) as temporary:
        temporary.write_bytes(content)
    print(
        f"wrote {args.o} ({file_size_mb(args.o):.2f} MB): {metadata.variant}, "
        f"{'any batch size' if args.batch_size is None else f'batch size {args.batch_size}'}"
    )


if __name__ == "__main__":
    errors.run(lambda: main(get_args_parser().parse_args()))
