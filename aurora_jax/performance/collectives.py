"""Reads the collectives of a compiled program from its HLO text: kind, bytes, count and mesh axes.

- The body of a loop counts once per trip.
- Of a conditional the usual branch counts. That is the only one with an all-to-all, if there is just one (the exchange
  of tokens; the other branch is its fall-back). Otherwise it is the branch that moves most. Collectives of the other
  branches are marked `fallback`.
- XLA for TPU repeats an asynchronous collective in every computation that it overlaps with. All copies have the same
  `chain_id` and count once.
- XLA for TPU writes a reduce-scatter as a fusion named `all-reduce-scatter`, with an all-reduce and a slice inside. It
  is reported as a reduce-scatter.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations|async_execution_thread_computation)=\{?([^}\s]+)")
_REDUCE_SCATTER = re.compile(r"^all-reduce-scatter[\w.\-]*$")  # a TPU's computation
_CHAIN = re.compile(r'\bchain_id="(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation of a program.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes along which the devices of a group differ.
    size: bytes of the full array that is gathered, summed, exchanged or sent, per device.
    groups: the groups of devices that communicate (positions in the mesh); for permutes (source, target) pairs.
    fallback: whether it is in a branch that is not the usual one.
  """

  kind: str
  axes: tuple[str, ...]
  size: int
  groups: tuple[tuple[int, ...], ...]
  fallback: bool = False

  @property
  def received(self) -> int:
    """Bytes that a device receives from others, by the best algorithm (a ring): a lower bound on every machine."""
    group = max(map(len, self.groups), default=1)
    if self.kind in ("collective-permute", "collective-broadcast"):
      return self.size
    return math.ceil(self.size * (group - 1) / group) * (2 if self.kind == "all-reduce" else 1)


def of_program(text: str, mesh: Mapping[str, int]) -> tuple[dict[Collective, int], int]:
  """All collectives of a program.

  Args:
    text: of the compiled module (`compiled.as_text()`).
    mesh: {axis: size} in the order of the mesh.

  Returns:
    ({Collective: executions per run}, number of loops with collectives and an unknown number of trips). Such a loop
    counts as one trip.

  Raises:
    ValueError: the text has no entry computation, or groups of devices in an unknown form.
  """
  computations, entry = _computations(text)
  if entry is None:
    raise ValueError("not the text of an HLO module: it has no ENTRY")
  unknown = set()
  return _collect(entry, computations, mesh, {}, unknown, set()), len(unknown)


def _computations(text):
  computations, entry, lines = {}, None, None
  for line in text.splitlines():
    if match := _HEADER.match(line):
      lines = computations[match[2]] = []
      entry = match[2] if match[1] else entry
    elif line.startswith("}"):
      lines = None
    elif lines is not None:
      lines.append(line)
  return computations, entry


def _collect(name, computations, mesh, done, unknown, chains):
  if name in done:
    return done[name]
  found = {}

  def add(collectives, times=1, fallback=False):
    for item, count in collectives.items():
      item = dataclasses.replace(item, fallback=True) if fallback else item
      found[item] = found.get(item, 0) + count * times

  inner = lambda called: _collect(called, computations, mesh, done, unknown, chains)
  for line in computations.get(name, ()):
    if match := _COLLECTIVE.search(line):
      chain = _CHAIN.search(line)
      if chain and chain[1] in chains:
        continue
      chains |= {chain[1]} if chain else set()
      item = _read(line, match, mesh)
      if item.kind == "all-reduce" and _REDUCE_SCATTER.match(name):
        item = dataclasses.replace(item, kind="reduce-scatter")
      add({item: 1})
    elif " while(" in line:
      body = inner(_name(line, "body"))
      trips = _trips(line, computations) if body else 1
      if trips is None:
        unknown.add((name, line))
      add(body, trips or 1)
    elif " conditional(" in line:
      branches = [inner(branch) for branch in _branches(line)]
      usual = _usual(branches)
      for i, branch in enumerate(branches):
        add(branch, fallback=i != usual)
    else:
      for match in _CALLED.finditer(line):
        for called in match[1].split(","):
          add(inner(called.strip().lstrip("%")))
  done[name] = found
  return found


def _usual(branches):
  exchanging = [i for i, branch in enumerate(branches) if any(item.kind == "all-to-all" for item in branch)]
  if len(exchanging) == 1:
    return exchanging[0]
  moved = [sum(item.received * times for item, times in branch.items()) for branch in branches]
  return max(range(len(branches)), key=moved.__getitem__)


def _name(line, field):
  return re.search(rf"\b{field}=%?([\w.\-]+)", line)[1]


def _branches(line):
  if match := re.search(r"branch_computations=\{([^}]*)\}", line):
    return [branch.strip().lstrip("%") for branch in match[1].split(",")]
  return [_name(line, "true_computation"), _name(line, "false_computation")]


def _trips(line, computations):
  """Trips of a loop: the compiler's own note, or else the bound of its counter (JAX counts up from 0), or None."""
  if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
    return int(match[1])
  condition = computations.get(_name(line, "condition"), ())
  constants = dict(re.findall(r"%?([\w.\-]+) = s(?:32|64)\[\]\S* constant\((\d+)\)", "\n".join(condition)))
  root = next((text for text in condition if text.lstrip().startswith("ROOT")), "")
  if match := re.search(r"compare\(\S+, %?([\w.\-]+)\), direction=LT", root):
    return int(constants[match[1]]) if match[1] in constants else None
  # The comparison is inside a fusion. If the condition has a single constant, it is the bound.
  return int(next(iter(constants.values()))) if len(constants) == 1 and "fusion(" in root else None


def _read(line, match, mesh):
  result, kind, start = match.groups()
  devices = math.prod(mesh.values())
  if kind == "collective-permute":
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    groups = _listed(pairs[1]) if pairs else ()
  else:
    groups = _groups(line, devices)
  group = max(map(len, groups), default=1)
  total = _type_bytes(result)
  if start and kind in ("all-gather", "reduce-scatter"):  # operand and result; one is 1/group of the other
    size = total * group / (group + 1)
  elif start and kind == "collective-permute":  # operand, result, and on TPU two u32 of context
    size = (total - 4 * len(re.findall(r"\bu32\[\]", result))) / 2
  elif start and kind != "all-reduce":
    size = total / 2
  else:
    size = total * group if kind == "reduce-scatter" else total
  return Collective(kind, _axes(groups, mesh), round(size), groups)


def _type_bytes(text):
  """Bytes of a type; of a tuple, the sum over its elements."""
  return sum(
    math.prod(int(size) for size in sizes.split(",") if size) * _element_bytes(dtype)
    for dtype, sizes in _ARRAY.findall(text)
  )


def _element_bytes(dtype):
  if dtype in _BYTES:
    return _BYTES[dtype]
  return int(re.match(r"[a-z]+(\d+)", dtype)[1]) // 8  # f32, s8, f8e4m3fn, ...


def _listed(text):
  """`{0,1},{2,3}` as tuples."""
  return tuple(
    tuple(int(n) for n in group.split(",") if n.strip())
    for group in re.findall(r"\{?([\d,\s]+)\}?", text)
    if group.strip(" ,")
  )


def _groups(line, devices):
  """The groups of devices of an operation, in any of the forms of HLO text."""
  if match := re.search(r"replica_groups=\{(\{.*?\})\}", line):
    return _listed(match[1])
  if "replica_groups={}" in line or "replica_groups=" not in line:
    return (tuple(range(devices)),)
  if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    shape, source = ([int(n) for n in text.split(",")] for text in match.groups()[:2])
    order = [int(n) for n in match[3].split(",")] if match[3] else range(len(source))
    numbers = _transposed(source, order)
    return tuple(tuple(numbers[i : i + shape[-1]]) for i in range(0, len(numbers), shape[-1]))
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", line):
    return _mesh_groups(*match.groups())
  raise ValueError(f"groups of devices in an unknown form: {line[line.index('replica_groups=') :][:120]}")


def _transposed(sizes, order):
  """0, 1, 2, ... reshaped to `sizes`, transposed by `order`, flattened."""
  strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
  ranges = [range(sizes[i]) for i in order]
  return [sum(index * strides[i] for index, i in zip(place, order)) for place in itertools.product(*ranges)]


def _mesh_groups(axes, order, grouped):
  """Groups in HLO's mesh notation.

  Args:
    axes: names and sizes, `'a'=2,'b'=4`.
    order: device numbers of the mesh, as a list or reshaped and transposed (`[4,2]T(1,0)`); or None.
    grouped: axes of a group, `'b'`. A part of an axis is written `'b':(2)2`: the sub-axis of size 2 whose major part
      has size 2.
  """
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
  wanted = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)
  }
  parts = []  # (size, whether the devices along it form a group); an axis that is grouped in part is split
  for name, size in sizes.items():
    if name in wanted:
      before, piece = wanted[name]
      parts += [(before, False), (piece, True), (size // (before * piece), False)]
    else:
      parts.append((size, False))
  places = sorted(range(len(parts)), key=lambda i: parts[i][1])  # grouped parts last
  numbers = _transposed([size for size, _ in parts], places)
  if order:
    devices = _device_numbers(order)
    numbers = [devices[number] for number in numbers]
  group = math.prod(size for size, meet in parts if meet)
  return tuple(tuple(numbers[i : i + group]) for i in range(0, len(numbers), group))


def _device_numbers(text):
  match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  if not match:
    return [int(number) for number in text.split(",")]
  sizes = [int(size) for size in match[1].split(",")]
  return _transposed(sizes, [int(i) for i in match[2].split(",")] if match[2] else range(len(sizes)))


def _axes(groups, mesh):
  """The mesh axes along which the devices of a group differ."""
  names, sizes = list(mesh), list(mesh.values())
  place = lambda device: [device // math.prod(sizes[i + 1 :]) % sizes[i] for i in range(len(sizes))]
  return tuple(
    name for i, name in enumerate(names) if any(len({place(device)[i] for device in group}) > 1 for group in groups)
  )
