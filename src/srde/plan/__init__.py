"""What a model with experts will need - parameters, FLOPs, memory, disk - before a weight is loaded."""

from srde.plan.figures import Adapter, Base, Plan, Run
from srde.plan.plan import Request, make_plan

__all__ = ["Adapter", "Base", "Plan", "Request", "Run", "make_plan"]
