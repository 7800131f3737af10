"""Plans, certificates, arrays and listings that somebody else wrote: read, or refused with why."""

from __future__ import annotations

import copy
import io
import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

import sfa_onnx
from sfa_onnx.ascend.handover.data import read_arrays
from sfa_onnx.cli.show import save_npz
from sfa_onnx.errors import BudgetError, FaultError, SfaError, UsageError
from sfa_onnx.files.arrays import stored_arrays
from sfa_onnx.files.json_form import form_problem, parsed
from sfa_onnx.passes.certificate import check_certificate
from sfa_onnx.passes.plan import read_plan
from tests.fuzz.corpus import gathered

ODD = (None, [], {}, "x", -1, True, ["a", 1], [[]], {"a": {}}, [{}])


def spoilt(value, path=()):
    """A JSON value with each of its parts, to a depth of three, replaced or taken away."""
    yield from ODD
    if len(path) == 3 or not isinstance(value, dict | list):
        return
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys if not path or "sites" in path else keys[:3]:
        for part in spoilt(value[key], (*path, key)):
            changed = copy.copy(value)
            changed[key] = part
            yield changed
        lacking = copy.copy(value)
        del lacking[key]
        yield lacking


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A folder with a model, its fused form and the certificate."""
    folder = tmp_path_factory.mktemp("stored")
    onnx.save(gathered(), folder / "m.onnx")
    sfa_onnx.fuse(folder / "m.onnx", folder / "f.onnx", certificate=folder / "c.json", verify=False)
    return folder


def test_a_spoilt_certificate_is_refused(fused):
    whole = json.loads((fused / "c.json").read_text())
    place, told = fused / "spoilt.json", set()
    for value in spoilt({k: v for k, v in whole.items() if not k.startswith("untouched_")}):
        place.write_text(json.dumps(value))
        with pytest.raises(UsageError) as caught:  # at the latest for want of the models
            check_certificate(place, fused / "none.onnx", fused / "none.onnx")
        told.add(str(caught.value).split(": ", 1)[-1])
    assert len(told) > 50
    assert any("sites[0].removed is" in text for text in told)


@pytest.mark.parametrize("change", ["nothing", "hash", "lost hash", "claim", "sites"])
def test_a_certificate_holds_only_as_it_was_written(fused, change):
    stated = json.loads((fused / "c.json").read_text())
    name = next(iter(stated["added_nodes"]))
    if change == "hash":
        stated["added_nodes"][name] = "0" * 32
    elif change == "lost hash":
        del stated["added_nodes"][name]
    elif change == "claim":
        del stated["difference"]["untouched_hash"]
    elif change == "sites":
        stated["sites"] = []
    (fused / "changed.json").write_text(json.dumps(stated))
    check = check_certificate(fused / "changed.json", fused / "m.onnx", fused / "f.onnx")
    assert check.holds == (change == "nothing")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"version": 1, "sites": 3}', "\xff", "NaN", "- a: 1"]
)
def test_a_plan_that_is_none(tmp_path, text):
    (tmp_path / "p").write_text(text, encoding="latin-1")
    with pytest.raises(UsageError):
        read_plan(tmp_path / "p")


def test_spoilt_plans(tmp_path):
    whole = {"version": 1, "assume": "a b", "sites": [{"id": "p", "fuse": True}]}
    for value in spoilt(whole):
        (tmp_path / "p").write_text(json.dumps(value) if isinstance(value, dict) else "sites: 3")
        try:
            plan = read_plan(tmp_path / "p")
        except UsageError:
            continue
        assert set(plan.chosen) <= {"p", "x"}


def _npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


class _Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


_GOOD = _npy(np.arange(3.0))
_HEAD = b"\x93NUMPY\x01\x00"
ARCHIVES = {
    "pickled": ({"x.npy": _npy(np.array([_Trap()], object), allow_pickle=True)}, "allow_pickle"),
    "a bare pickle": ({"x.npy": pickle.dumps(_Trap())}, "no array"),
    "text": ({"x": b"hello"}, "no array"),
    "records": ({"x.npy": _npy(np.zeros(2, "i4,f4"))}, "an array of records"),
    "half a header": ({"x.npy": _HEAD + b"\x28\x23" + b"(" * 9000}, "not an .npz"),
    "a short array": ({"x.npy": _GOOD[:-4]}, "not an .npz"),
    "another version": ({"x.npy": b"\x93NUMPY\x09\x09" + _GOOD[8:]}, "not an .npz"),
    "an exabyte": (
        {"x.npy": _GOOD.replace(b"(3,), }" + b" " * 18, b"(1152921504606846976,), }")},
        "not an",
    ),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_of_other_things(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, told = ARCHIVES[name]
    with zipfile.ZipFile("a.npz", "w") as archive:
        for entry, data in files.items():
            archive.writestr(entry, data)
    with pytest.raises(SfaError, match=told) as caught:
        stored_arrays(Path("a.npz"))
    assert not isinstance(caught.value, FaultError)
    assert not Path("sprung").exists()


def test_one_array_is_no_archive_and_twice_is_once_too_often(tmp_path, monkeypatch):
    place = tmp_path / "a.npz"
    place.write_bytes(_GOOD)
    with pytest.raises(UsageError, match=r"not an \.npz"):
        stored_arrays(place)
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr("x.npy", _GOOD)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", _GOOD)
    with pytest.raises(UsageError, match="two arrays of one name"):
        stored_arrays(place)
    np.savez_compressed(place, x=np.zeros(1 << 16))
    monkeypatch.setenv("SFA_ONNX_MAX_INPUT_BYTES", str(1 << 18))
    with pytest.raises(BudgetError, match="SFA_ONNX_MAX_INPUT_BYTES"):
        stored_arrays(place)  # of a few hundred bytes on disk


def test_a_listing_of_a_device_reads_files_of_its_own_folder(tmp_path):
    folder = tmp_path / "outputs"
    folder.mkdir()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array.tofile(folder / "o.bin")
    array.tofile(tmp_path / "o.bin")
    entry = {"name": "o", "file": "o.bin", "dtype": "float32", "numpy": "float32", "shape": [2, 3]}

    def read(change):
        (folder / "outputs.json").write_text(json.dumps([{**entry, **change}]))
        return read_arrays(folder, "outputs.json")["o"]

    np.testing.assert_array_equal(read({}), array)
    assert read({"dtype": "bfloat16", "numpy": "uint16", "shape": ["?"]}).shape == (12,)
    for change in (
        *({"file": name} for name in ("../o.bin", str(tmp_path / "o.bin"), "", ".", "a\0", 3)),
        *({"dtype": name} for name in ("ndarray", "finfo", "float", [], "i4,f4", "O", "S0")),
        *({"numpy": name} for name in ("O", "nothing", "i4,O", None)),
        *({"shape": shape} for shape in ([5], [-1, -1], 3, [1 << 70])),
    ):
        try:
            read(change)
        except UsageError:
            continue
        assert change in ({"dtype": "float"}, {"dtype": "i4,f4"}), change
    for text in ("{}", "[3]", "[" * 100_000, "\udcff"):
        (folder / "outputs.json").write_text(text, errors="surrogateescape")
        with pytest.raises(UsageError, match="not a listing"):
            read_arrays(folder, "outputs.json")


def test_forms_name_the_place_that_does_not_fit():
    form = {"a": [{"b": (str, int)}], "?c": {str: bool}}
    assert form_problem({"a": [], "more": 3}, form) == ""
    assert form_problem({"a": [{"b": ["x", 1]}], "c": {"y": True}}, form) == ""
    assert form_problem({"a": [{"b": ["x", True]}]}, form) == (
        "a[0].b[1] is true, expected a whole number"
    )
    assert form_problem({"a": [{"b": ["x"]}]}, form) == 'a[0].b is ["x"], expected a list of 2'
    assert form_problem({"a": [], "c": {"y": 1}}, form) == "c['y'] is 1, expected true or false"
    assert form_problem({"a": [{}]}, form) == "a[0] lacks 'b'"
    assert form_problem([], form) == "it is [], expected an object"
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed('{"a":' * 100_000)


def test_outputs_of_any_name_and_type_are_stored_without_pickles(tmp_path):
    arrays = {
        "file": np.arange(3),
        "a/b:0": np.float32([1.5]),
        "narrow": np.array([1.5], ml_dtypes.bfloat16),
        "texts": np.array(["a", "bc"], object),
    }
    save_npz(tmp_path / "o.npz", arrays)
    found = stored_arrays(tmp_path / "o.npz")
    assert list(found) == list(arrays)
    assert found["narrow"].dtype == np.float32
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])
