"""Charges the usage that agents report, before results with usage are accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

from orki.control.v1.attempt_pb2 import Budget, BudgetBalance
from orki.control.v1.session_pb2 import Result
from orki_control.session import ArrivedUsage, AttemptKey
from orki_server._budgets import Budgets
from orki_server._results import result_report
from orki_server._session import AgentSession, ChargedTo
from orki_server._store.budget import Lineage, charge, lineage, over_budget, used_up
from orki_server._store.operations import Operation
from orki_server._store.replies import ReportReply

Accept: TypeAlias = Callable[[AgentSession, AttemptKey, Result, Callable[..., Operation[ReportReply]]], None]


class Charges:
    """Charges usage to budgets.

    `enqueue` applies an operation for a session and passes on its outcome, `accept` applies a result, and `refuse`
    tells the agent that it does not hold an attempt.
    """

    def __init__(
        self,
        budgets: Budgets,
        enqueue: Callable[..., None],
        accept: Accept,
        refuse: Callable[[AgentSession, AttemptKey], None],
    ) -> None:
        self._budgets = budgets
        self._enqueue = enqueue
        self._accept = accept
        self._refuse = refuse

    def used(self, session: AgentSession, usages: Iterable[ArrivedUsage]) -> None:
        """Charge the usage of running attempts, and tell the agent what is left."""
        for key, total in usages:
            self._charge(session, key, total, partial(self._charged, session, key, total))

    def settle(self, session: AgentSession, key: AttemptKey, result: Result) -> None:
        """Charge the usage of a result, then accept it. An attempt that a budget ended is suspended."""
        waits = result.suspended.over_budget

        def charged(balances: list[BudgetBalance] | None) -> None:
            session.budgets.pop(key, None)
            self._budgets.spent(balances or [])
            if waits:
                clause = used_up(balances or ())
                report: Any = partial(over_budget, message=f"paused: {clause}", raised=not clause)
            else:
                report = partial(result_report, result=result)
            self._accept(session, key, result, report)

        self._charge(session, key, result.usage, charged, waits=waits)

    def _charge(
        self,
        session: AgentSession,
        key: AttemptKey,
        total: Budget,
        then: Callable[[list[BudgetBalance] | None], None],
        *,
        waits: bool = False,
    ) -> None:
        """Charge usage, then pass on the budgets; None if the agent does not hold the attempt."""

        def known(found: Lineage | None) -> None:
            if found is None or not found.runs or not found.accounts:
                then([] if found is not None and found.runs else None)
                return
            session.budgets.setdefault(key, ChargedTo(found.accounts))
            self._enqueue(session, partial(charge, found.accounts, key, total, waits=waits), then, key)

        if (charged_to := session.budgets.get(key)) is not None:
            known(Lineage("", charged_to.accounts))
        else:
            # The attempt was offered on another session.
            self._enqueue(session, partial(lineage, key), known, key)

    def _charged(
        self, session: AgentSession, key: AttemptKey, total: Budget, balances: list[BudgetBalance] | None
    ) -> None:
        if balances is None:
            self._refuse(session, key)
        elif balances:
            self._budgets.charged(session, key, total, balances)
