"""The two data sets of the training script, as whole tensors: scikit-learn's digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib
import math
import os
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
"""Name of each file without ``.gz``, and the MD5 of the published ``.gz``."""

FASHION_MNIST_FOLDER = Path("FashionMNIST", "raw")
FASHION_MNIST_SIZE = 28

DIGITS_TEST_IMAGES = 297
DIGITS_PEAK = 16

DOWNLOAD_CHUNK = 1 << 16
REMEDY = "delete it and run again with --download to fetch it anew"


class DatasetError(ValueError):
    """A data file that is missing, damaged, foreign or cannot be fetched: which, where, why, remedy."""


class MissingPackageError(ImportError):
    """An optional package that is not installed; the message names the command that brings it."""


@dataclass(frozen=True)
class Dataset:
    """Images and labels of a classification problem, small enough to live on the device as a whole.

    name: what the data set is called in messages and in the default output folder.
    train_images, test_images: uint8 [N, C, H, W].
    train_labels, test_labels: int64 [N], each in 0 .. num_classes - 1.
    peak: the pixel value that means white; a model is fed pixels / peak.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    peak: int
    num_classes: int = 10

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]


def require(package: str, distribution: str | None = None) -> ModuleType:
    """Import a package of the ``[train]`` extra.

    Args:
        package: the name to import.
        distribution: the name to show, where it differs.

    Raises:
        MissingPackageError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f'{distribution or package} cannot be imported ({error}); run pip install -e ".[train]"'
        ) from error


def digits() -> Dataset:
    """scikit-learn's bundled digits: 1797 real 8x8 images with pixels 0 .. 16.

    The split is stratified and always the same: 1500 images to train on, 297 to test on.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "scikit-learn").load_digits()
    split = require("sklearn.model_selection", "scikit-learn").train_test_split
    parts = split(
        bunch.images.astype(np.uint8)[:, None],
        bunch.target.astype(np.int64),
        test_size=DIGITS_TEST_IMAGES,
        stratify=bunch.target,
        random_state=0,
    )
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    return Dataset("digits", train_images, train_labels, test_images, test_labels, peak=DIGITS_PEAK)


def fashion_mnist(data_dir: Path) -> Dataset:
    """Fashion-MNIST from its four IDX files, each as published (``.gz``) or unpacked.

    data_dir: a folder with ``FashionMNIST/raw`` (torchvision's layout), or itself the folder of the files.

    Raises:
        DatasetError: a file is missing, damaged or not what its name says.
    """
    train_images, train_labels = _read_pair(data_dir, "train")
    test_images, test_labels = _read_pair(data_dir, "t10k")
    return Dataset("fashion-mnist", train_images, train_labels, test_images, test_labels, peak=255)


def has_fashion_mnist(data_dir: Path) -> bool:
    """Whether any of the four files is there; reading them then says which is missing or damaged."""
    folder = _folder(data_dir)
    return any(_find(folder, name) is not None for name in FASHION_MNIST_MD5)


def read_idx(path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """Read one IDX file of unsigned bytes, gzipped where its name ends in ``.gz``.

    The format: two zero bytes, the element type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, then the elements in C order and nothing after them.

    Args:
        path: the file.
        shape: what its dimensions have to be; None stands for any number but zero.

    Returns:
        uint8 array of those dimensions.

    Raises:
        DatasetError: the file cannot be read, or is not such a file to the last byte.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{path}: corrupt gzip file ({error}); {REMEDY}") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror or error})") from error
    magic = bytes((0, 0, 8, len(shape)))
    if content[:4] != magic:
        raise DatasetError(
            f"{path}: starts with {content[:4].hex(' ') or 'nothing'} where an IDX file of bytes in "
            f"{len(shape)} dimension(s) starts with {magic.hex(' ')}; {REMEDY}"
        )
    header = 4 + 4 * len(shape)
    if len(content) < header:
        raise DatasetError(f"{path}: ends after {len(content)} bytes, within its header; {REMEDY}")
    found = tuple(int(n) for n in np.frombuffer(content[4:header], dtype=">u4"))
    if any(n == 0 or want not in (None, n) for n, want in zip(found, shape, strict=True)):
        wanted = "x".join("N" if n is None else str(n) for n in shape)
        raise DatasetError(f"{path}: holds {'x'.join(map(str, found))} values, wants {wanted}; {REMEDY}")
    size = len(content) - header
    if size != math.prod(found):
        what = "is truncated" if size < math.prod(found) else "has trailing bytes"
        raise DatasetError(f"{path}: {what}: {size} bytes of data where its header says {math.prod(found)}; {REMEDY}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(found).copy()


def download_fashion_mnist(
    data_dir: Path,
    *,
    base_url: str = FASHION_MNIST_URL,
    checksums: Mapping[str, str] = FASHION_MNIST_MD5,
    timeout: float = 30.0,
) -> list[Path]:
    """Fetch those of the four files that are not there or damaged, with a progress bar for each.

    Args:
        data_dir: see :func:`fashion_mnist`; ``FashionMNIST/raw`` is made where nothing is there yet.
        base_url: address of the folder that holds the files.
        checksums: MD5 of each ``.gz``, by its name without ``.gz``.
        timeout: seconds without an answer after which the server counts as silent.

    Returns:
        The files that were fetched.

    Raises:
        DatasetError: the address does not answer, or what it sends has another checksum.
        MissingPackageError: tqdm is not installed.
    """
    folder = _folder(data_dir)
    fetched = []
    for name, checksum in checksums.items():
        target = folder / f"{name}.gz"
        if not _is_good(folder, name, checksum):
            _fetch(f"{base_url.rstrip('/')}/{target.name}", target, checksum, timeout)
            fetched.append(target)
    return fetched


def _read_pair(data_dir: Path, part: str) -> tuple[Tensor, Tensor]:
    folder = _folder(data_dir)
    paths = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        path = _find(folder, name)
        if path is None:
            raise DatasetError(f"{folder / name}[.gz]: not found; run again with --download to fetch it")
        paths.append(path)
    images = read_idx(paths[0], _shape(paths[0].name))
    labels = read_idx(paths[1], _shape(paths[1].name))
    if len(images) != len(labels):
        raise DatasetError(
            f"{paths[1]}: holds {len(labels)} labels for {len(images)} images in {paths[0].name}; {REMEDY}"
        )
    if labels.max() > 9:
        raise DatasetError(f"{paths[1]}: holds the label {labels.max()}, wants 0 to 9; {REMEDY}")
    return torch.from_numpy(images[:, None]), torch.from_numpy(labels.astype(np.int64))


def _shape(name: str) -> tuple[int | None, ...]:
    return (None, FASHION_MNIST_SIZE, FASHION_MNIST_SIZE) if "images" in name else (None,)


def _folder(data_dir: Path) -> Path:
    """torchvision's folder under data_dir, or data_dir itself where only that holds any of the files."""
    nested = data_dir / FASHION_MNIST_FOLDER
    for folder in (nested, data_dir):
        if any(_find(folder, name) for name in FASHION_MNIST_MD5):
            return folder
    return nested


def _find(folder: Path, name: str) -> Path | None:
    """The ``.gz`` first: it carries a checksum, and it is what a download replaces."""
    candidates = (folder / f"{name}.gz", folder / name)
    return next((path for path in candidates if path.exists()), None)


def _is_good(folder: Path, name: str, checksum: str) -> bool:
    path = _find(folder, name)
    if path is None:
        return False
    try:
        if path.suffix == ".gz":
            return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == checksum
        read_idx(path, _shape(name))
    except (OSError, DatasetError):
        return False
    return True


def _fetch(url: str, target: Path, checksum: str, timeout: float) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            arrived = _receive(url, partial, target.name, timeout)
            if arrived != checksum:
                raise DatasetError(
                    f"{url}: arrived with MD5 {arrived}, wants {checksum}; nothing was kept, try "
                    f"again or put the published file at {target}"
                )
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        raise DatasetError(
            f"{url}: cannot be fetched to {target} ({error}); check the network and the folder, or put the "
            "published file there"
        ) from error


def _receive(url: str, path: Path, label: str, timeout: float) -> str:
    """Write what url sends to path, with a progress bar; returns its MD5."""
    tqdm = require("tqdm").tqdm
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=timeout) as answer, open(path, "wb") as file:
        total = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm(desc=label, total=total, unit="B", unit_scale=True) as bar:
            while chunk := answer.read(DOWNLOAD_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()
