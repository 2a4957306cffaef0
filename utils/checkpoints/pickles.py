"""Check a pickle before anything is made of it: the classes and functions that it names, and its memory."""

import pickletools
import re
from typing import IO

NAMES_OF_TENSORS = re.compile(
    r"torch\._utils _rebuild_(tensor(_v2)?|parameter|meta_tensor_no_storage)|torch\.nn\.parameter Parameter"
    r"|torch (\w+Storage|Size|device|bool|(b|q|u|qu)?(int|float|complex)\d\w*)"
    r"|collections (OrderedDict|Counter)|builtins set"
)
"""What files of dense tensors and plain values name.

torch.load with weights_only knows more, such as bytearray and _codecs.encode, which allocate what they are
told to and double a text with every call.
"""


class NotPlainError(Exception):
    """A pickle names other classes or functions than those of dense tensors."""


def check_pickle(file: IO[bytes], names: re.Pattern[str] | None = None) -> None:
    """Check a pickle without unpickling it, and leave the file where it ends.

    Args:
        file: open at the start of the pickle.
        names: the classes and functions that the pickle may name; None if the caller checks them.

    Raises:
        NotPlainError: the pickle names something else.
        ValueError: it is not a pickle, or reserves memory for more objects than it can hold.
    """
    for opcode, argument, position in pickletools.genops(file):
        if (
            names
            and opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL")
            and not names.fullmatch(argument or "")
        ):
            raise NotPlainError(f"the pickle names {argument}")
        # Python's unpickler makes its table of objects as long as the largest index.
        if opcode.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > int(position or 0):
            raise ValueError("the pickle has an index that is too large")
