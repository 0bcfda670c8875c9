"""What a change of a contract means: findings on an old and a new one, each with its rule and the bump it asks for."""

from orki_contract.findings.compare import CATEGORIES, RULES, findings, required_bump
from orki_contract.findings.finding import Bump, Category, Finding, Plane, Rule
from orki_contract.findings.fit import Fit, service_fit, stream_fit

__all__ = [
    "CATEGORIES",
    "RULES",
    "Bump",
    "Category",
    "Finding",
    "Fit",
    "Plane",
    "Rule",
    "findings",
    "required_bump",
    "service_fit",
    "stream_fit",
]
