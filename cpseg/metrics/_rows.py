"""One row of int64 counts per unit: what every metric remembers, and all that it remembers."""

from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol, TypeAlias, cast, final

import torch
from torch import Tensor

from cpseg import _checks
from cpseg.errors import InputError

UnitIds: TypeAlias = Sequence[int] | Tensor | None


class Settings(Protocol):
    """A metric, as far as its arguments go: the fields of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


@final
class Rows:
    """Counts per unit: columns of a metric, then one column of faulty pixels per rule.

    A unit without an id is one batch entry and gets a row of its own. Rows of one id are added up
    as they come, so there are never more rows than units. No row is ever written to: metrics that
    were merged may share them.

    Args:
        metric: Whose settings must agree in a merge.
        counts: Columns of each table that :meth:`tables` returns.
        rules: What a pixel counted in each of the last columns broke.
    """

    def __init__(self, metric: Settings, counts: Sequence[int], rules: Sequence[str]) -> None:
        self._kind = type(metric).__name__
        self._settings = {name: getattr(metric, name) for name in _names(type(metric))}
        self._counts = list(counts)
        self._rules = list(rules)
        self._named: dict[int, Tensor] = {}
        self._unnamed: list[Tensor] = []

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"{self._kind}({settings})"

    def add(self, rows: Sequence[Tensor], ids: Sequence[int] | None) -> None:
        """Add a batch: its tables side by side, then a column of faults per rule."""
        table = torch.cat([row if row.ndim == 2 else row[:, None] for row in rows], dim=1)
        if ids is None:
            self._unnamed += [table] if len(table) else []
            return
        for unit, row in zip(ids, table, strict=True):
            self._hold(unit, row.clone())  # not a view, which would keep the whole batch

    def _hold(self, unit: int, row: Tensor) -> None:
        held = self._named.get(unit)
        self._named[unit] = row if held is None else held + row.to(held.device)

    def merge(self, other: object) -> None:
        """Add the rows of another metric of the same kind and settings."""
        theirs = getattr(other, "_rows", None)
        if not isinstance(theirs, Rows) or theirs._kind != self._kind:
            raise InputError(f"other must be a {self._kind}; got {type(other).__name__}")
        if theirs._settings != self._settings:
            raise InputError(f"other must be a {self} to be merged; got {theirs}")
        self._unnamed = [*self._unnamed, *theirs._unnamed]
        for unit, row in list(theirs._named.items()):
            self._hold(unit, row)

    def reset(self) -> None:
        """Forget everything."""
        self._named, self._unnamed = {}, []

    def tables(self) -> list[Tensor]:
        """The counts of units that have any, in canonical order, on the CPU. ``(n, k)`` each.

        Raises:
            InputError: If a pixel broke a rule.
        """
        _, rows = self._settled()
        *tables, faults = torch.split(_canonical(rows), [*self._counts, len(self._rules)], dim=1)
        for rule, count in zip(self._rules, faults.sum(0).tolist(), strict=True):
            if count:
                raise InputError(f"{rule}; got {count} pixels that do not")
        return tables

    def state(self) -> dict[str, object]:
        """Settings, rows and ids: those of the first ``len(unit_ids)`` rows."""
        ids, rows = self._settled()
        rows = torch.cat((rows[: len(ids)], _canonical(rows[len(ids) :])))
        return {"kind": self._kind, **self._settings, "rows": rows, "unit_ids": ids}

    def load(self, state: Mapping[str, object]) -> None:
        """Take over the rows of a :meth:`state`."""
        rows, ids = state["rows"], state["unit_ids"]
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 2:
            raise InputError(
                f"state must hold rows as an int64 tensor of shape (n, K); got {_said(rows)}"
            )
        width = sum(self._counts) + len(self._rules)
        if rows.shape[1] != width:
            raise InputError(
                f"state must hold rows of {width} counts; got {rows.shape[1]} per image"
            )
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
            raise InputError(
                f"state must hold unit_ids as an int64 tensor of shape (n,); got {_said(ids)}"
            )
        units = cast("list[int]", ids.tolist())
        if len(set(units)) != len(units) or len(units) > len(rows):
            raise InputError(
                f"state must hold a row for each of its unit_ids, which differ; "
                f"got {len(units)} ids and {len(rows)} rows"
            )
        self.reset()
        self.add([rows[: len(units)]], units)
        self.add([rows[len(units) :].clone()], None)

    def _settled(self) -> tuple[Tensor, Tensor]:
        """Ids, ascending, and the rows that count for anything: theirs, then the others."""
        ids = sorted(self._named)
        width = sum(self._counts) + len(self._rules)
        named = torch.cat([_no_rows(width), *(self._named[unit].cpu()[None] for unit in ids)])
        others = torch.cat([_no_rows(width), *(rows.cpu() for rows in self._unnamed)])
        seen = named.any(1)
        return torch.tensor(ids, dtype=torch.int64)[seen], torch.cat(
            (named[seen], others[others.any(1)])
        )


def settings_of(kind: type[Settings], given: object) -> dict[str, Any]:
    """The arguments of a metric out of its state, whose keys must be all there."""
    if not isinstance(given, Mapping):
        raise InputError(f"state must be that of a {kind.__name__}; got {type(given).__name__}")
    state = cast("Mapping[str, object]", given)
    names = _names(kind)
    if state.get("kind") != kind.__name__ or set(state) != {"kind", "rows", "unit_ids", *names}:
        raise InputError(
            f"state must be that of a {kind.__name__}; got {state.get('kind')!r} "
            f"with {', '.join(map(str, state)) or 'nothing'}"
        )
    return {name: state[name] for name in names}


def checked_ids(unit_ids: UnitIds, batch: int) -> list[int] | None:
    """Unit ids of a batch as Python integers; a tensor must be on the CPU: nothing waits."""
    if unit_ids is None:
        return None
    ids = _checks.check_ids("unit_ids", unit_ids)
    if len(ids) != batch:
        raise InputError(f"unit_ids must have one id per batch entry, {batch}; got {len(ids)}")
    return ids


def _names(kind: type[Settings]) -> list[str]:
    return [name for name, field in kind.__dataclass_fields__.items() if field.init]


def _no_rows(width: int) -> Tensor:
    return torch.zeros(0, width, dtype=torch.int64)


def _canonical(rows: Tensor) -> Tensor:
    """Rows in an order that depends on nothing but their counts."""
    if not len(rows):
        return rows
    found = cast("tuple[Tensor, Tensor]", torch.unique(rows, dim=0, return_counts=True))
    return found[0].repeat_interleave(found[1], 0)


def _said(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {_checks.describe(value.shape)}"
    return type(value).__name__
