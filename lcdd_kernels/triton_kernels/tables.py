"""Small tables that kernels read: sent to the device without making the host wait, kept while they are the same, and
safe in CUDA graphs and across streams.

    copy        from pinned memory, queued on the stream that is current when the table is first asked for
    streams     another stream that asks for it waits for the copy on the device, and keeps the memory from being reused
    graphs      a table that a captured kernel reads is kept for good. One that is first asked for inside a capture is
                copied by the graph, at every replay, from pinned memory that is kept too; nobody else is given it, as
                its memory is the graph's
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

_captured: list[object] = []  # what graphs read


@dataclass(frozen=True, eq=False)
class _Entry:
    tensor: Tensor
    pinned: Tensor
    stream: torch.cuda.Stream
    copied: torch.cuda.Event


class TableCache:
    """The `size` tables that were asked for last, by key."""

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, _Entry | Tensor] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The table that `make` returns on the CPU, on `device`; `make` is called where `key` is not known."""
        key = (key, device)
        entry = self._entries.get(key)
        if entry is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return _copy_in_graph(make(), device)
            entry = _copy(make(), device)
            self._entries[key] = entry
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(key)
        return entry if isinstance(entry, Tensor) else _on_current_stream(entry, device)


def _copy(table: Tensor, device: torch.device) -> _Entry | Tensor:
    if device.type != "cuda":
        return table.to(device)
    with torch.cuda.device(device):
        pinned = table.pin_memory()
        entry = _Entry(
            pinned.to(device, non_blocking=True), pinned, torch.cuda.current_stream(device), torch.cuda.Event()
        )
        entry.copied.record(entry.stream)
    return entry


def _copy_in_graph(table: Tensor, device: torch.device) -> Tensor:
    pinned = table.pin_memory()
    tensor = pinned.to(device, non_blocking=True)
    _captured.extend((pinned, tensor))
    return tensor


def _on_current_stream(entry: _Entry, device: torch.device) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        _captured.append(entry)  # whatever was queued before a capture began has been waited for
        return entry.tensor
    stream = torch.cuda.current_stream(device)
    if stream != entry.stream:
        stream.wait_event(entry.copied)
        entry.tensor.record_stream(stream)
    return entry.tensor
