"""Files of arrays: PyTorch's and safetensors, without PyTorch's reader, and nothing in them is run."""

import argparse
import collections
import io
import os
import pathlib
import pickle
import re
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from aurora_jax.errors import UserError
from aurora_jax.interop import tensor_files
from aurora_jax.interop.stored_array import StoredArray

torch = pytest.importorskip("torch")


def one_line(path, call=tensor_files.read):
  """The message of the UserError that reading `path` raises."""
  with pytest.raises(UserError) as caught:
    call(path)
  message = str(caught.value)
  assert "\n" not in message and str(path) in message
  return message


def bits(array):
  return np.ascontiguousarray(array).view(np.uint8)


@pytest.fixture(params=["with torch", "without torch"])
def with_and_without_torch(request, monkeypatch):
  if request.param == "without torch":
    monkeypatch.setitem(sys.modules, "torch", None)
  return request.param


def tensors():
  """Tensors of all kinds that a checkpoint may hold."""
  generator = torch.Generator().manual_seed(0)
  base = torch.randn(6, 5, generator=generator)
  made = collections.OrderedDict(
    float32=base,
    again=base,
    transposed=base.T,
    part=base[2:5, 1::2],
    expanded=base[0].expand(3, 5),
    scalar=base[0, 0],
    parameter=torch.nn.Parameter(base * 2),
    empty=torch.zeros(0, 3),
    truth=base > 0,
    channels_last=torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
  )
  for dtype in (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
  ):
    made[str(dtype).removeprefix("torch.")] = (base.double() * 20).abs().to(dtype)
  return made


def as_numpy(tensor):
  tensor = tensor.detach().contiguous()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def test_torch_files_bit_by_bit(tmp_path, monkeypatch):
  made, path = tensors(), tmp_path / "x.pth"
  expected = {name: as_numpy(tensor) for name, tensor in made.items()}
  torch.save(
    {
      "generator_smooth": made,
      "running_metadata": {
        "iter": 7,
        "lr": [0.1, None],
        "size": torch.Size([2, 3]),
        "dtype": torch.float32,
        "at": torch.device("cpu"),
      },
    },
    path,
  )
  monkeypatch.setitem(sys.modules, "torch", None)
  content = tensor_files.read(path)
  assert content["running_metadata"] == {"iter": 7, "lr": [0.1, None], "size": [2, 3], "dtype": "float32", "at": "cpu"}
  stored = content["generator_smooth"]
  assert list(stored) == list(made)
  for name, array in expected.items():
    assert isinstance(stored[name], StoredArray) and tensor_files.is_array(stored[name])
    read = stored[name].read()
    assert (stored[name].shape, read.dtype) == (array.shape, array.dtype), name
    np.testing.assert_array_equal(bits(read), bits(array), err_msg=name)
    np.testing.assert_array_equal(np.asarray(stored[name], np.float32), array.astype(np.float32), err_msg=name)


def test_only_what_is_read_is_read(tmp_path):
  """A slice of a large storage does not bring the storage."""
  torch.save({"rows": torch.arange(10_000.0).reshape(100, 100)[40:42]}, tmp_path / "x.pt")
  rows = tensor_files.read(tmp_path / "x.pt")["rows"]
  assert rows.span == 800
  np.testing.assert_array_equal(rows.read(), np.arange(4000.0, 4200.0).reshape(2, 100))


def test_the_format_before_1_6(tmp_path, monkeypatch):
  made, path = tensors(), tmp_path / "x.bin"
  del made["uint16"]  # PyTorch itself cannot write it so
  expected = {name: as_numpy(tensor) for name, tensor in made.items()}
  torch.save({"deep": {"weights": made}, "iter": 7}, path, _use_new_zipfile_serialization=False)
  monkeypatch.setitem(sys.modules, "torch", None)
  content = tensor_files.read(path)
  weights = content["deep"]["weights"]
  assert content["iter"] == 7 and list(weights) == list(expected)
  for name, array in expected.items():
    read = weights[name].read()
    assert tensor_files.is_array(weights[name]) and (weights[name].shape, read.dtype) == (array.shape, array.dtype), (
      name
    )
    np.testing.assert_array_equal(bits(read), bits(array), err_msg=name)


def test_damaged_files_of_the_format_before_1_6(tmp_path):
  whole, path = tmp_path / "whole.pth", tmp_path / "bad.pth"
  torch.save({"w": torch.zeros(1000)}, whole, _use_new_zipfile_serialization=False)
  data = whole.read_bytes()
  for length in (3, 20, 200, len(data) - 4000, len(data) - 1):
    path.write_bytes(data[:length])
    assert "cut off" in one_line(path) or length < 10
  before, after = data.split(b"little_endian")
  count = data.rindex((1000).to_bytes(8, "little"))
  for bad, words in (
    (data[:count] + (999).to_bytes(8, "little") + data[count + 8 :], "another size than 1000"),
    (before + b"little_endian" + after.replace(b"\x88", b"\x89", 1), "only little-endian"),
    (pickle.dumps({"w": 1}), "no file of PyTorch's"),
  ):
    path.write_bytes(bad)
    assert words in one_line(path)


class Evil:
  def __init__(self, function, argument):
    self.what = function, (argument,)

  def __reduce__(self):
    return self.what


_WRITERS = {
  "zip": torch.save,
  "before 1.6": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
  "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
  "text pickle": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)),
}


@pytest.mark.parametrize("writer", _WRITERS)
def test_code_is_named_and_does_not_run(tmp_path, writer, with_and_without_torch, monkeypatch):
  canary, path = tmp_path / "ran", tmp_path / "evil.pth"
  if "torch" in sys.modules and sys.modules["torch"] is None:
    monkeypatch.setitem(sys.modules, "torch", torch)
  for function, argument, name in (
    (os.system, f"touch {canary}", "posix.system"),
    (exec, f"open({str(canary)!r}, 'w')", "exec"),
    (os.mkdir, str(canary), "posix.mkdir"),
  ):
    value = (
      {"generator": {"w": torch.zeros(3)}, "x": Evil(function, argument)}
      if "pickle" not in writer
      else [Evil(function, argument)]
    )
    _WRITERS[writer](value, path)
    if with_and_without_torch == "without torch":
      monkeypatch.setitem(sys.modules, "torch", None)
    assert name in one_line(path)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert not canary.exists()
  # The pickles do what they say where nobody looks.
  pickle.loads(pickle.dumps(Evil(os.mkdir, str(canary))))
  assert canary.exists()


def rezip(source, target, change):
  """Copies a zip file with its data.pkl changed."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
    for info in old.infolist():
      data = old.read(info)
      new.writestr(info.filename, change(data) if info.filename.endswith("data.pkl") else data)


def test_a_pickle_cannot_reach_beyond_its_own_tensors(tmp_path):
  """Hand-made pickles that use the permitted globals for something else."""
  torch.save({"w": torch.zeros(3)}, tmp_path / "good.pth")
  path = tmp_path / "bad.pth"
  tensor = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI3\ntQI0\n"
    b"(I%d\nt(I%d\ntI00\nccollections\nOrderedDict\n)RtR"
  )
  build = lambda shape, stride: tensor % (shape, stride)
  cases = {
    b"}S'w'\n" + build(3, 1) + b"s.": None,  # well-behaved
    b"}S'w'\n" + build(4, 1) + b"s.": "in a storage of 12",
    b"}S'w'\n" + build(2, -1) + b"s.": "strides",
    b"}S'w'\n" + build(3, 1) + b"}S'path'\nS'/etc/passwd'\nsbs.": "damaged",  # to set an attribute of the tensor
    b"}S'w'\nctorch\nFloatStorage\n}S'x'\nI1\nsbs.": "damaged",
    b"}S'w'\nctorch\nload\n(S'x'\ntRs.": "torch.load",
    b"}S'w'\ncaurora_jax.interop.torch_zip\nread\n(S'x'\ntRs.": "aurora_jax.interop.torch_zip.read",
    b"\x80\x04}\x8c\x01w\x8c\x0bcollections\x8c\x1dOrderedDict.__init_subclass__\x93s.": "OrderedDict.__init_sub",
    b"(S'w'\nt.": "holds a list",
    b"}": "damaged",
  }
  for data, words in cases.items():
    rezip(tmp_path / "good.pth", path, lambda _, data=data: data)
    if words is None:
      np.testing.assert_array_equal(tensor_files.read(path)["w"].read(), np.zeros(3))
    else:
      assert words in one_line(path), data


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix, suffix):
  weights = {"a.weight": torch.arange(3.0), "module": torch.zeros(1)}
  wrapped, path = {prefix + name: tensor for name, tensor in weights.items()}, tmp_path / f"x{suffix}"
  if suffix == ".pth":
    torch.save({"generator": wrapped, "other": weights, "deep": {"er": wrapped}, "iter": 7}, path)
    content = tensor_files.read(path)
    assert content["iter"] == 7 and list(content["other"]) == list(weights)
    sets = {"generator": content["generator"], "deep.er": content["deep"]["er"]}
    said = [f"{name}: all names begin with '{prefix}', which was taken off" for name in sets]
  else:
    safetensors.numpy.save_file({name: tensor.numpy() for name, tensor in wrapped.items()}, path)
    content = tensor_files.read(path)
    sets, said = {"": content}, [f"all names begin with '{prefix}', which was taken off"]
  assert list(content.notes) == said
  for stored in sets.values():
    assert sorted(stored) == sorted(weights)
    np.testing.assert_array_equal(stored["a.weight"].read(), [0, 1, 2])


def test_a_prefix_that_not_all_have_stays(tmp_path):
  torch.save({"module.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.pth")
  content = tensor_files.read(tmp_path / "x.pth")
  assert sorted(content) == ["b", "module.a"] and content.notes == ()


@pytest.mark.parametrize("zipped", [True, False])
def test_scalars_and_arrays_of_numpy(tmp_path, zipped, monkeypatch):
  values = {
    "float64": np.float64(3.25),
    "float32": np.float32(-1.5),
    "float16": np.float16(0.5),
    "int64": np.int64(-7),
    "uint8": np.uint8(200),
    "truth": np.bool_(True),
    "text": np.str_("äpfel"),
    "complex": np.complex64(1 + 2j),
    "big": np.array([1, 2], ">i4"),
    "array": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "empty": np.zeros((0, 2)),
    "state": np.random.RandomState(3).get_state(),
  }
  torch.save({"w": torch.ones(2), "best": values}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
  monkeypatch.setitem(sys.modules, "torch", None)
  content = tensor_files.read(tmp_path / "x.pth")
  np.testing.assert_array_equal(content["w"].read(), [1, 1])
  for name, value in values.items():
    if name == "state":
      assert content["best"][name][0] == value[0] and content["best"][name][2:] == list(value[2:])
      np.testing.assert_array_equal(content["best"][name][1], value[1])
    else:
      np.testing.assert_array_equal(content["best"][name], value)


def test_arrays_of_numpy_1_and_of_protocol_4(tmp_path):
  for change, protocol in ((lambda data: data.replace(b"numpy._core", b"numpy.core"), 2), (lambda data: data, 4)):
    torch.save(
      {"w": torch.ones(2), "a": np.float64(2), "b": np.arange(3)}, tmp_path / "y.pth", pickle_protocol=protocol
    )
    rezip(tmp_path / "y.pth", tmp_path / "x.pth", change)
    content = tensor_files.read(tmp_path / "x.pth")
    assert content["a"] == 2 and content["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  "data",
  [
    b"cnumpy\ndtype\n(S'O8'\nI00\nI01\ntR.",
    b"cnumpy\ndtype\n(S'f8'\ntRcnumpy\ndtype\n(S'f8'\ntRb.",
    b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'f8'\ntRS'ab'\ntR.",
    b"cnumpy.core.multiarray\nscalar\n(S'f8'\nS'ab'\ntR.",
    b"cnumpy.core.multiarray\n_reconstruct\n(I1\ntR(I1\n(I99999999999\ntcnumpy\ndtype\n(S'f8'\ntRI00\nS'ab'\ntb.",
    b"cnumpy.core.multiarray\n_reconstruct\n(I1\ntR}S'value'\nI1\nsb.",
    b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
    b"cnumpy\nload\n(S'x'\ntR.",
    b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
  ],
)
def test_numpy_cannot_be_misused(tmp_path, data):
  torch.save({"w": torch.zeros(3)}, tmp_path / "good.pth")
  rezip(tmp_path / "good.pth", tmp_path / "bad.pth", lambda _: data)
  message = one_line(tmp_path / "bad.pth")
  assert "damaged" in message or "holds code" in message


@pytest.mark.slow
@pytest.mark.parametrize(
  "value, name",
  [(argparse.Namespace(lr=1), "argparse.Namespace"), (pathlib.PurePosixPath("x"), "pathlib.PurePosixPath")],
)
def test_objects_beside_the_weights(tmp_path, value, name):
  """One line says how to make a file that is taken; it is right."""
  path = tmp_path / "x.pth"
  torch.save({"generator_smooth": {"w": torch.ones(2)}, "args": value}, path)
  message = one_line(path)
  assert f"({name})" in message
  code = re.search(r"(c = torch.load.*'weights.pth'\))", message)[1].replace("KEYS", "['generator_smooth']")
  subprocess.run([sys.executable, "-c", f"import torch; {code}"], check=True, cwd=tmp_path)
  np.testing.assert_array_equal(tensor_files.read(tmp_path / "weights.pth")["generator_smooth"]["w"].read(), [1, 1])


def test_nobody_is_told_to_load_code(tmp_path):
  torch.save({"w": torch.ones(2), "x": Evil(os.system, "true")}, tmp_path / "x.pth")
  assert "weights_only" not in one_line(tmp_path / "x.pth")


def test_files_of_other_kinds(tmp_path, with_and_without_torch):
  del with_and_without_torch
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("a/readme.txt", "hello")
  cases = {
    "empty.pth": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "page.pth": (b"<!DOCTYPE html><html>not found</html>", "a text file, not weights (it begins with '<!DOCTYPE"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs"),
    "other.pth": (buffer.getvalue(), "it has no data.pkl"),
    "noise.pth": (bytes(range(128, 256)), ""),
    "noise.safetensors": (bytes(range(128, 256)), "no safetensors file"),
    "x.txt": (b"x", "weights are read from"),
  }
  for name, (data, words) in cases.items():
    (tmp_path / name).write_bytes(data)
    assert words in one_line(tmp_path / name), name
  (tmp_path / "folder.pth").mkdir()
  assert "is a folder" in one_line(tmp_path / "folder.pth")
  one_line(tmp_path / "missing.pth")


def test_cut_off_files(tmp_path, with_and_without_torch, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", torch)
  torch.save({"w": torch.zeros(1000)}, tmp_path / "whole.pth")
  safetensors.numpy.save_file({"w": np.zeros(1000, np.float32)}, tmp_path / "whole.safetensors")
  if with_and_without_torch == "without torch":
    monkeypatch.setitem(sys.modules, "torch", None)
  for suffix in (".pth", ".safetensors"):
    data = (tmp_path / f"whole{suffix}").read_bytes()
    for length in (3, 20, len(data) // 2, len(data) - 1):
      path = tmp_path / f"cut{length}{suffix}"
      path.write_bytes(data[:length])
      message = one_line(path)
      assert "cut off" in message or length < 30
  # Cut off after it was opened.
  stored = tensor_files.read(tmp_path / "whole.pth")["w"]
  os.truncate(tmp_path / "whole.pth", 500)
  assert "cut off" in one_line(tmp_path / "whole.pth", lambda _: stored.read())


def test_safetensors_as_their_own_library_reads_them(tmp_path):
  arrays = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 2), np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
  }
  shapes = {name: array.shape for name, array in arrays.items()}
  tensor_files.write_safetensors(tmp_path / "x.safetensors", shapes, reversed(arrays.items()))
  theirs = safetensors.numpy.load_file(tmp_path / "x.safetensors")
  ours = tensor_files.read(tmp_path / "x.safetensors")
  assert set(theirs) == set(ours) == set(arrays)
  for name, array in arrays.items():
    for read in (theirs[name], ours[name].read()):
      assert read.shape == array.shape
      np.testing.assert_array_equal(read, array)
  with pytest.raises(ValueError, match="not written"):
    tensor_files.write_safetensors(tmp_path / "y.safetensors", shapes, [("a", arrays["a"])])
  half = {"h": np.arange(3).astype(np.float16), "b": np.arange(3).astype(ml_dtypes.bfloat16)}
  safetensors.numpy.save_file(half, tmp_path / "h.safetensors")
  for name, array in tensor_files.read(tmp_path / "h.safetensors").items():
    assert array.read().dtype == half[name].dtype and array.read().tolist() == [0, 1, 2]
