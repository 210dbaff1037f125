"""Data files of the training script: what is read back bit for bit, what is refused and in which words."""

from __future__ import annotations

import gzip
import hashlib
import socket
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_googlenet
from training import image_sets
from training.image_sets import DatasetError, download_fashion_mnist, fashion_mnist, has_fashion_mnist, read_idx

NAMES = tuple(image_sets.FASHION_MNIST_MD5)
IMAGES, LABELS = NAMES[:2]


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def sample(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_all(folder: Path, suffix: str = "", train: int = 5, test: int = 3) -> list[np.ndarray]:
    arrays = [*sample(train, 0), *sample(test, 1)]
    for name, array in zip(NAMES, arrays, strict=True):
        write(folder / f"{name}{suffix}", idx_bytes(array))
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [Path(), image_sets.FASHION_MNIST_FOLDER], ids=["direct", "torchvision"])
def test_round_trip(tmp_path, suffix, layout):
    assert not has_fashion_mnist(tmp_path)
    arrays = write_all(tmp_path / layout, suffix)
    assert has_fashion_mnist(tmp_path)
    data = fashion_mnist(tmp_path)
    read = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    for tensor, array in zip(read, arrays, strict=True):
        expected = torch.from_numpy(array)
        if array.ndim == 3:
            assert tensor.dtype == torch.uint8
            expected = expected[:, None]
        else:
            assert tensor.dtype == torch.int64
        assert tensor.shape == expected.shape
        assert torch.equal(tensor, expected.to(tensor.dtype))
    assert (data.peak, data.channels, data.num_classes) == (255, 1, 10)


def test_digits_are_split_the_same_way_every_time():
    first, second = image_sets.digits(), image_sets.digits()
    assert first.train_images.shape == (1500, 1, 8, 8)
    assert first.test_images.shape == (297, 1, 8, 8)
    assert first.train_images.dtype == torch.uint8
    assert first.train_images.max() == first.peak == 16
    for labels, least in ((first.train_labels, 145), (first.test_labels, 29)):
        assert labels.dtype == torch.int64
        assert torch.bincount(labels, minlength=10).min() >= least
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.test_labels, second.test_labels)


GOOD = idx_bytes(sample(4, 2)[0])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "starts with nothing"),
        (b"\x00\x00", "starts with 00 00 where"),
        (b"<html>not found</html>", "starts with 3c 68 74 6d"),
        (GOOD[:3] + b"\x01" + GOOD[4:], "starts with 00 00 08 01"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "starts with 00 00 0d 03"),
        (gzip.compress(GOOD), "starts with 1f 8b"),
        (GOOD[:9], "within its header"),
        (idx_bytes(np.zeros((4, 8, 8))), "holds 4x8x8 values, wants Nx28x28"),
        (idx_bytes(np.zeros((0, 28, 28))), "holds 0x28x28 values"),
        (GOOD[:-1], "is truncated: 3135 bytes of data where its header says 3136"),
        (GOOD[:4] + b"\xff\xff\xff\xff" + GOOD[8:], "is truncated"),
        (GOOD + b"\x00", "has trailing bytes: 3137"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_file_is_named_with_the_remedy(tmp_path, content, problem, suffix):
    path = write(tmp_path / f"{IMAGES}{suffix}", content)
    with pytest.raises(DatasetError) as caught:
        read_idx(path, (None, 28, 28))
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)
    assert "delete it and run again with --download" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "foreign", "flipped"])
def test_corrupt_gzip(tmp_path, damage):
    packed = bytearray(gzip.compress(GOOD))
    if damage == "cut":
        packed = packed[:-20]
    elif damage == "flipped":
        packed[-6] ^= 1  # within the checksum of the content
    else:
        packed = bytearray(GOOD)
    path = tmp_path / f"{IMAGES}.gz"
    path.write_bytes(bytes(packed))
    with pytest.raises(DatasetError, match="corrupt gzip file") as caught:
        read_idx(path, (None, 28, 28))
    assert str(path) in str(caught.value)


def test_unreadable_file(tmp_path):
    (tmp_path / IMAGES).mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        read_idx(tmp_path / IMAGES, (None, 28, 28))


@pytest.mark.parametrize("name", NAMES)
def test_missing_file_is_named(tmp_path, name):
    write_all(tmp_path)
    (tmp_path / name).unlink()
    assert has_fashion_mnist(tmp_path)
    with pytest.raises(DatasetError, match="not found; run again with --download") as caught:
        fashion_mnist(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_nothing_there_points_to_torchvisions_folder(tmp_path):
    with pytest.raises(DatasetError) as caught:
        fashion_mnist(tmp_path)
    assert str(tmp_path / "FashionMNIST" / "raw" / IMAGES) in str(caught.value)


def test_images_and_labels_have_to_match(tmp_path):
    write_all(tmp_path)
    write(tmp_path / LABELS, idx_bytes(sample(6, 3)[1]))
    with pytest.raises(DatasetError, match=f"{LABELS}: holds 6 labels for 5 images in {IMAGES}"):
        fashion_mnist(tmp_path)


def test_labels_have_to_be_classes(tmp_path):
    write_all(tmp_path)
    write(tmp_path / LABELS, idx_bytes(np.array([0, 9, 10, 3, 4])))
    with pytest.raises(DatasetError, match=f"{LABELS}: holds the label 10, wants 0 to 9"):
        fashion_mnist(tmp_path)


@pytest.fixture
def server(tmp_path):
    """A folder as address, the checksums of its four files, and their arrays."""
    folder = tmp_path / "server"
    arrays = write_all(folder, ".gz")
    sums = {name: hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest() for name in NAMES}
    return folder, sums, arrays


def test_download(tmp_path, server):
    folder, sums, arrays = server
    data_dir = tmp_path / "data"
    fetched = download_fashion_mnist(data_dir, base_url=folder.as_uri(), checksums=sums)
    raw = data_dir / "FashionMNIST" / "raw"
    assert fetched == [raw / f"{name}.gz" for name in NAMES]
    assert sorted(raw.iterdir()) == sorted(fetched)
    assert torch.equal(fashion_mnist(data_dir).test_images[:, 0], torch.from_numpy(arrays[2]))


def test_download_fetches_only_what_is_not_good(tmp_path, server):
    folder, sums, _ = server
    data_dir = tmp_path / "data"
    raw = data_dir / "FashionMNIST" / "raw"
    kept = write(raw / IMAGES, idx_bytes(sample(5, 0)[0]))
    (raw / f"{LABELS}.gz").write_bytes(b"damaged")
    (raw / NAMES[2]).write_bytes(b"damaged")
    fetch = {"base_url": folder.as_uri(), "checksums": sums}
    assert download_fashion_mnist(data_dir, **fetch) == [raw / f"{name}.gz" for name in NAMES[1:]]
    assert kept.exists()
    fashion_mnist(data_dir)
    assert download_fashion_mnist(data_dir, **fetch) == []


def test_download_refuses_another_checksum_and_keeps_nothing(tmp_path, server):
    folder, sums, _ = server
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    with pytest.raises(DatasetError, match=f"wants {'0' * 32}; nothing was kept") as caught:
        download_fashion_mnist(tmp_path / "data", base_url=folder.as_uri(), checksums=sums | {LABELS: "0" * 32})
    assert sums[LABELS] in str(caught.value)
    assert [path.name for path in raw.iterdir()] == [f"{IMAGES}.gz"]


def test_download_from_an_address_that_does_not_answer(tmp_path, server):
    folder, sums, _ = server
    (folder / f"{IMAGES}.gz").unlink()
    with pytest.raises(DatasetError, match="cannot be fetched") as caught:
        download_fashion_mnist(tmp_path / "data", base_url=folder.as_uri(), checksums=sums)
    assert f"{IMAGES}.gz" in str(caught.value)
    assert list((tmp_path / "data" / "FashionMNIST" / "raw").iterdir()) == []


def test_download_into_a_folder_that_cannot_be_made(tmp_path, server):
    folder, sums, _ = server
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(DatasetError, match="cannot be fetched"):
        download_fashion_mnist(tmp_path / "data", base_url=folder.as_uri(), checksums=sums)


def test_download_gives_a_silent_server_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(DatasetError, match=r"cannot be fetched .*timed out"):
            download_fashion_mnist(tmp_path, base_url=address, timeout=0.2)


def test_missing_package_is_answered_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(image_sets.MissingPackageError, match=r'scikit-learn .*pip install -e "\.\[train\]"'):
        image_sets.digits()


def test_default_preset_on_a_gpu(tmp_path, capsys):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    parse = train_googlenet.parse
    args = parse(["--data-dir", str(tmp_path)])
    assert train_googlenet.default_preset(args, cpu) == "digits"
    assert capsys.readouterr().err == ""
    assert train_googlenet.default_preset(args, gpu) == "digits"
    message = capsys.readouterr().err
    assert f"no Fashion-MNIST under {tmp_path}" in message
    assert "--download" in message
    assert message.count("\n") == 1
    assert train_googlenet.default_preset(parse(["--download"]), gpu) == "seed"
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    assert train_googlenet.default_preset(args, gpu) == "seed"
