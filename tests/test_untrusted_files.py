"""Checkpoints that anybody may have written: nothing in them runs, and they get no more memory than they hold."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from pl_dendrites import attach, load_from_checkpoint
from pl_dendrites.report import main, read_history
from pl_dendrites.saved.folder import read_folder, weights_to_fit
from tests.models import QUIET, classifier, loaders, quick, train
from tests.sharded import Linears, strategy

RAN = "it-ran"


@pytest.fixture(autouse=True)
def _nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path(RAN).exists()


class Runs:
    """A pickle of it leaves a directory behind when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, (RAN,)


class BuildsRuns:
    """The same by way of an object that is made and then told its state."""

    def __reduce__(self) -> Any:
        return type, ("name", (), {}), {"state": Runs()}


def folder(name: str = "whole.ckpt", **more: Any) -> Path:
    """A checkpoint of a grown model as strategies write one, but in one process."""
    model = BoringModel()
    attach(model).grow(["layer"])
    path = Path(name)
    path.mkdir(parents=True)
    optimizer = {"state": {"layer.weight": {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    save({"state_dict": model.state_dict(), "optimizer_0": optimizer, **more}, checkpoint_id=path, no_dist=True)
    torch.save({"pytorch-lightning_version": "2.6.0"}, path / "meta.pt")
    return path


def index_of(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


def write_index(path: Path, index: Any) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(index))


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def test_a_folder_as_pytorch_writes_it_is_read() -> None:
    path = folder()
    model = load_from_checkpoint(BoringModel, path)
    again = read_folder(path)["state_dict"]
    assert model.layer.dendrites.count == 1
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
    assert not torch.distributed.is_initialized()


# -- nothing runs ------------------------------------------------------------------------------------------------------


def in_the_index(path: Path, thing: Any) -> None:
    write_index(path, thing)


def in_a_key_of_the_index(path: Path, thing: Any) -> None:
    index = index_of(path)
    index.planner_data["more"] = thing
    write_index(path, index)


def in_what_is_stored_where(path: Path, thing: Any) -> None:
    index = index_of(path)
    index.storage_meta = thing
    write_index(path, index)


def in_the_rest(path: Path, thing: Any) -> None:
    torch.save({"pytorch-lightning_version": "2.6.0", "hyper_parameters": thing}, path / "meta.pt")


def in_a_tensor_of_its_own_file(path: Path, thing: Any) -> None:
    """The bytes that are a tensor's according to the index."""
    file = io.BytesIO()
    torch.save(thing, file)
    index = index_of(path)
    for at, info in index.storage_data.items():
        if at.fqn.startswith("state_dict"):
            info.relative_path, info.offset, info.length = "more.distcp", 0, len(file.getvalue())
    (path / "more.distcp").write_bytes(file.getvalue() + bytes(10**5))
    write_index(path, index)


def in_an_optimizers_settings(path: Path, thing: Any) -> None:
    """What Lightning reads under FSDP2 with the permission to run anything."""
    file = io.BytesIO()
    torch.save(thing, file)
    index = index_of(path)
    flat = "optimizer_0.more"
    index.state_dict_metadata[flat], index.planner_data[flat] = BytesStorageMetadata(), ("optimizer_0", "more")
    info = next(iter(index.storage_data.values()))
    index.storage_data[MetadataIndex(flat)] = type(info)("more.distcp", 0, len(file.getvalue()))
    (path / "more.distcp").write_bytes(file.getvalue())
    write_index(path, index)


PLACES = [
    in_the_index,
    in_a_key_of_the_index,
    in_what_is_stored_where,
    in_the_rest,
    in_a_tensor_of_its_own_file,
    in_an_optimizers_settings,
]


@pytest.mark.parametrize("thing", [Runs, BuildsRuns])
@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_folder_does_not_run(place: Callable[[Path, Any], None], thing: type, capsys: Any) -> None:
    path = folder("runs/whole.ckpt")
    place(path, thing())
    if place is not in_an_optimizers_settings:  # which nobody reads who does not go on training
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_from_checkpoint(BoringModel, path)
    for run in ("runs", "runs/whole.ckpt"):
        with pytest.raises(SystemExit):
            main([run, "report.html"])
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("thing", [Runs, BuildsRuns])
@pytest.mark.parametrize("place", [*PLACES[:3], PLACES[5]])
def test_code_in_a_folder_does_not_run_where_a_fit_goes_on_from_it(place: Any, thing: type) -> None:
    path = folder("runs/whole.ckpt")
    place(path, thing())
    alone = QUIET | {"devices": 1, "max_epochs": 1, "strategy": strategy(data_parallel_size=1)}
    trainer = L.Trainer(callbacks=[quick()], **alone)
    try:
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            trainer.fit(Linears(), *loaders(), ckpt_path=path)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


NAMES = [
    ("os", "system"),
    ("builtins", "eval"),
    ("torch", "load"),
    ("torch", "nn.Linear"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
    ("pathlib", "Path"),
    ("functools", "partial"),
    ("copyreg", "_reconstructor"),
    ("pl_dendrites.saved.folder_index", "read_index"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_names_that_no_index_needs_are_refused(module: str, name: str, protocol: int) -> None:
    path = folder()
    if protocol == 4:
        data = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93."
    else:
        data = (b"\x80\x02" if protocol else b"") + f"c{module}\n{name}\n.".encode()
    (path / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=f"names '{module}.{name}', which is nothing that a checkpoint holds"):
        read_folder(path)


@pytest.mark.parametrize("data", [b"\x82\x01.", b"\x97.", b"Pname\n.", b"(cos\nsystem\no.", b"(S'ls'\nios\nsystem\n."])
def test_operations_that_no_index_needs_are_refused(data: bytes) -> None:
    """Objects that other pickles left behind, buffers of the reader, persistent ones, and instances made in passing."""
    path = folder()
    (path / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_folder(path)


def test_an_index_changes_nothing_that_the_next_one_is_read_with() -> None:
    path, good = folder(), folder("good.ckpt")
    record = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    state = b"(N}(X\x0c\x00\x00\x00__setstate__I1\nX\x04\x00\x00\x00argsI1\nut"
    (path / ".metadata").write_bytes(b"\x80\x02" + record + state + b"b.")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_folder(path)
    assert read_folder(good)["state_dict"]


# -- nor does it lead elsewhere ----------------------------------------------------------------------------------------


def elsewhere(path: Path, name: str) -> None:
    index = index_of(path)
    for info in index.storage_data.values():
        info.relative_path = name
    write_index(path, index)


@pytest.mark.parametrize("name", ["../outside.distcp", "ABSOLUTE", "link.distcp", "sub/../../outside.distcp", "", "."])
def test_a_folder_does_not_lead_outside(name: str) -> None:
    path = folder("whole.ckpt")
    Path("outside.distcp").write_bytes((path / "__0_0.distcp").read_bytes())
    (path / "link.distcp").symlink_to("../outside.distcp")
    elsewhere(path, str(Path("outside.distcp").absolute()) if name == "ABSOLUTE" else name)
    for read in (read_folder, lambda path: weights_to_fit(path, False)):
        with pytest.raises(ValueError, match="is no file in it"):
            read(path)


@pytest.mark.parametrize("name", ["meta.pt", ".metadata"])
def test_its_own_files_do_not_lie_outside(name: str) -> None:
    path = folder()
    (path / name).rename("moved")
    (path / name).symlink_to("../moved")
    with pytest.raises(ValueError, match=f"'{name}' is no file in it"):
        read_folder(path)


def test_a_folder_that_is_a_link_is_read() -> None:
    folder("whole.ckpt")
    Path("link.ckpt").symlink_to("whole.ckpt")
    assert load_from_checkpoint(BoringModel, "link.ckpt").layer.dendrites.count == 1


def test_a_report_reads_no_weights() -> None:
    dendrites = quick()
    train(classifier(), dendrites)
    path = folder("runs/whole.ckpt")
    torch.save({"callbacks": {"DendriteCallback": dendrites.state_dict()}}, path / "meta.pt")
    for name in (".metadata", "__0_0.distcp"):
        (path / name).unlink()
    for run in ("runs", "runs/whole.ckpt"):
        assert len(read_history(run)) == len(dendrites.history)


def test_a_directory_is_searched_past_what_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    Path("dangling.ckpt").symlink_to("nowhere")
    write_index(folder("bad.ckpt"), Runs())
    with pytest.raises(SystemExit):
        main([".", "report.html"])
    assert "no state of a DendriteCallback" in capsys.readouterr().err


# -- and gets what it holds --------------------------------------------------------------------------------------------

HUGE = 2 * 10**9


def resized(path: Path, change: Callable[[Any, Any], None]) -> None:
    index = index_of(path)
    flat = "state_dict.layer.weight"
    change(index.state_dict_metadata[flat], next(info for at, info in index.storage_data.items() if at.fqn == flat))
    write_index(path, index)


def larger(entry: Any, info: Any) -> None:
    entry.size = torch.Size([HUGE, 32])


def larger_in_one_piece(entry: Any, info: Any) -> None:
    entry.size = entry.chunks[0].sizes = torch.Size([HUGE, 32])


def beyond_all_numbers(entry: Any, info: Any) -> None:
    entry.size = entry.chunks[0].sizes = torch.Size([2**62, 2**62])


def below_zero(entry: Any, info: Any) -> None:
    entry.size = entry.chunks[0].sizes = torch.Size([-HUGE, -32])


def longer(entry: Any, info: Any) -> None:
    entry.size = entry.chunks[0].sizes = torch.Size([HUGE, 32])
    info.length = HUGE * 200


SIZES = [larger, larger_in_one_piece, beyond_all_numbers, below_zero, longer]


@pytest.mark.parametrize("change", SIZES)
def test_a_folder_gets_no_more_than_its_files_hold(change: Callable[[Any, Any], None]) -> None:
    path = folder()
    resized(path, change)
    for read in (read_folder, lambda path: weights_to_fit(path, False)):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            read(path)


def test_entries_of_a_folder_that_are_the_same_bytes_are_refused() -> None:
    path = folder()
    index = index_of(path)
    flat = "state_dict.layer.weight"
    for number in range(50):
        name = f"state_dict.copy{number}"
        index.state_dict_metadata[name], index.planner_data[name] = (
            index.state_dict_metadata[flat],
            ("state_dict", f"copy{number}"),
        )
        index.storage_data |= {
            MetadataIndex(name, at.offset): info for at, info in list(index.storage_data.items()) if at.fqn == flat
        }
    write_index(path, index)
    with pytest.raises(ValueError, match="its files hold"):
        read_folder(path)


MEMORY = """
import resource, sys
from pathlib import Path
from pl_dendrites.saved.folder import read_folder
from pl_dendrites.saved.reading import read_values
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in map(Path, sys.argv[1:]):
    before, said = most(), "taken"
    try:
        read_folder(path) if path.is_dir() else read_values(path, path)
    except ValueError:
        said = "refused"
    print(said, most() - before)
"""


def to_refuse(*paths: Path) -> list[tuple[str, bool]]:
    """For each file whether it is refused, and whether that took more than 40 MB."""
    run = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=False)
    said = [line.split() for line in run.stdout.splitlines()]
    assert len(said) == len(paths), run.stderr
    return [(answer, int(number) > 40) for answer, number in said]


def archive(change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file of PyTorch's, each of whose parts is changed."""
    file, out = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(10)}}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def as_pickle(pickled: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, data: pickled if name.endswith("data.pkl") else data


def compressed() -> bytes:
    size, count = 4 * 10**8, b"J" + struct.pack("<i", 10**8)

    def change(name: str, data: bytes) -> bytes:
        return bytes(size) if name.endswith("data/0") else data.replace(b"K\x0a", count)

    return archive(change, zipfile.ZIP_DEFLATED)


def counted(name: bytes) -> bytes:
    number = b"J" + struct.pack("<i", 10**9)
    return archive(as_pickle(b"\x80\x02}X\x0a\x00\x00\x00state_dictc" + name + number + b"\x85Rs."))


BOMBS = {
    "compressed": compressed,
    "bytearray": lambda: counted(b"__builtin__\nbytearray\n"),
    "bytearray of Python 3": lambda: counted(b"builtins\nbytearray\n"),
    "tensor": lambda: counted(b"torch\nTensor\n"),
    "bytearray in an old file": lambda: b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 10**9) + b"\x85R.",
}
INDEX_BOMBS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x1f.",
    "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 10**9) + b".",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b"N.",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 10**12) + b"N.",
}


def hollow() -> Path:
    """A tensor that repeats one number, where its index says so too."""
    path = folder("hollow.ckpt")
    file = io.BytesIO()
    torch.save(torch.zeros(1).expand(HUGE), file)
    (path / "more.distcp").write_bytes(file.getvalue())

    def change(entry: Any, info: Any) -> None:
        entry.size = entry.chunks[0].sizes = torch.Size([HUGE])
        entry.chunks[0].offsets = torch.Size([0])
        info.relative_path, info.offset, info.length = "more.distcp", 0, len(file.getvalue())

    resized(path, change)
    return path


@pytest.mark.long
def test_what_is_small_does_not_get_a_gigabyte() -> None:
    paths = {name: Path(f"{name}.ckpt") for name in BOMBS}
    for name, path in paths.items():
        path.write_bytes(BOMBS[name]())
        assert path.stat().st_size < 500_000
    for name, data in INDEX_BOMBS.items():
        paths[name] = folder(f"{name}.ckpt")
        (paths[name] / ".metadata").write_bytes(data)
    paths["hollow"] = hollow()
    assert dict(zip(paths, to_refuse(*paths.values()), strict=True)) == dict.fromkeys(paths, ("refused", False))
    for path in paths.values():
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_from_checkpoint(BoringModel, path)
