"""Files on a disk: written so that a power cut loses none, and read without trusting them.

A file is written under a temporary name, flushed to the disk, and renamed; the rename is on the disk when the
folder is flushed.  What a file says is read without what its tensors hold, and nothing in it is executed.
"""

import argparse
import collections
import contextlib
import inspect
import mmap
import os
import pickle
import re
import shutil
import struct
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterable, Optional, Tuple

import torch
from torch import Tensor

TEMPORARY = ".tmp"
"""What the name of a file has at its end until it is whole."""

_ATTEMPTS, _SECONDS = 3, 2.5
_THREADS = 4


def write(state: Dict[str, Any], path: str) -> None:
    """Write what ``torch.save`` writes, and flush it to the disk; tried again as fairseq does.

    Raises:
        Exception: that of the last attempt; then there is no file.
    """
    for attempt in range(_ATTEMPTS):
        try:
            with open(path, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            return
        except BaseException as error:
            remove([path])
            if attempt == _ATTEMPTS - 1 or not isinstance(error, Exception):
                raise
            time.sleep(_SECONDS)


def copy(source: str, target: str) -> None:
    """Copy a file, and flush the copy to the disk; there is none if that fails."""
    try:
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException:
        remove([target])
        raise


def rename(path: str) -> None:
    """Give a file its name in place of its temporary one, and of whatever has that name."""
    os.replace(path + TEMPORARY, path)


def flush_folders(paths: Iterable[str]) -> None:
    """Flush to the disk which names the folders of some files have."""
    for folder in sorted({os.path.dirname(os.path.abspath(path)) for path in paths}):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError:  # a file system that cannot
            pass
        finally:
            os.close(number)


def remove(paths: Iterable[str]) -> None:
    """Remove those of some files that are there."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def load(path: str) -> Any:
    """What a file of ``torch.save`` holds, on the CPU, with nothing in it executed.

    torch >= 2.1 leaves tensors in the file until they are used, so that a rank reads what it keeps.

    Raises:
        Exception: it is no such file, or has something that no checkpoint of fairseq's has.
    """
    known = inspect.signature(torch.load).parameters
    lazily = {"mmap": True} if "mmap" in known and zipfile.is_zipfile(path) else {}
    if hasattr(torch.serialization, "add_safe_globals"):  # which compat.py has told of fairseq's classes
        return torch.load(path, map_location="cpu", weights_only=True, **lazily)
    return load_restricted(path, **lazily)


def load_restricted(path: str, **keywords: Any) -> Any:
    """As ``load``, with a torch that would execute whatever a file says."""
    if "weights_only" in inspect.signature(torch.load).parameters:
        keywords["weights_only"] = False
    restricted = types.ModuleType("restricted")
    vars(restricted).update(vars(pickle), Unpickler=_Restricted, load=_load_restricted)
    with open(path, "rb") as file:
        keywords.pop("mmap", None)  # which needs a path
        return torch.load(file, map_location="cpu", pickle_module=restricted, **keywords)


def _load_restricted(file: Any, **keywords: Any) -> Any:
    return _Restricted(file, **keywords).load()


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): argparse.Namespace,
}
_HARMLESS = re.compile(
    r"torch \w*Storage|torch\.storage \w+|torch (Size|device|dtype|float\w*|bfloat16|u?int\w*|bool)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.serialization _get_layout"
    r"|numpy(\._?core\.multiarray)? (scalar|dtype)|numpy\.dtypes \w+|_codecs encode"
    r"|fairseq\.dataclass\.constants \w+"
)


class _Restricted(pickle.Unpickler):
    """Makes nothing but what a checkpoint of fairseq's holds."""

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if "." in name or not _HARMLESS.fullmatch(f"{module} {name}"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def skim(path: str) -> Any:
    """What a file of ``torch.save`` holds, with tensors that have a shape and no values.

    This reads a few kilobytes, with any version of torch, and executes nothing.

    Raises:
        Exception: it is no such file.
    """
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]*/data\.pkl", name)]
        with archive.open(name) as file:
            return _Skimming(file).load()


class _Skimming(_Restricted):
    """Tensors are of the device ``meta``, and whatever is not known is nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return _shape_of_parameter if "parameter" in name else _shape_of_tensor
        return _KNOWN.get((module, name)) or _DTYPES.get(f"{module} {name}") or _Nothing

    def persistent_load(self, identifier: Any) -> Any:
        return identifier[1]  # the type of the storage


def _shape_of_tensor(dtype: Any, _: int, size: Tuple[int, ...], *rest: Any) -> Tensor:
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.float32
    return torch.empty(size, dtype=dtype, device="meta")


def _shape_of_parameter(tensor: Tensor, *rest: Any) -> Tensor:
    return tensor


_DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class _Nothing:
    """What stands for an object of an unknown class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Nothing":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def broken_record(path: str) -> Optional[str]:
    """A part of a zip archive, such as each of ``torch.save``'s tensors, whose CRC is not that of its bytes.

    One gigabyte takes 0.4 s of one core's time, divided among up to four.

    Returns:
        its name; ``None`` if there is none.

    Raises:
        zipfile.BadZipFile: it is no archive, or its directory is damaged.
    """
    _check_directory(path)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:

            def is_broken(record: zipfile.ZipInfo) -> bool:
                with _bytes_of(view, record) as part:
                    return zlib.crc32(part) != record.CRC

            with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
                records = archive.infolist()
                broken = [record.filename for record, x in zip(records, pool.map(is_broken, records)) if x]
    return broken[0] if broken else None


def _check_directory(path: str) -> None:
    """Refuse an archive whose directory PyTorch cannot read, though Python can: it has no CRC."""
    try:
        torch._C.PyTorchFileReader(path).get_all_records()
    except (RuntimeError, UnicodeDecodeError) as error:
        raise zipfile.BadZipFile(f"the directory of {path} is damaged") from error


def _bytes_of(view: memoryview, record: zipfile.ZipInfo) -> memoryview:
    start, header = record.header_offset, 30
    signature, flags, method = struct.unpack("<4s2xHH", view[start : start + 10])
    length, extra = struct.unpack("<HH", view[start + 26 : start + header])
    name = bytes(view[start + header : start + header + length])
    # what is said in two places, here and in the directory of the archive
    said_twice = (name, flags, method) == (
        record.orig_filename.encode(),
        record.flag_bits,
        record.compress_type,
    )
    if signature != b"PK\x03\x04" or method != zipfile.ZIP_STORED or not said_twice:
        raise zipfile.BadZipFile(f"the header of {record.filename} is damaged")
    start += header + length + extra
    return view[start : start + record.file_size]
