"""The plan of an optimization: the steps that a run would take now, and the reasons."""

from resources.plan.model_plan import ModelPlan, PlannedStep, State
from resources.plan.planner import plan_model
from resources.plan.reasons import differences

__all__ = ["ModelPlan", "PlannedStep", "State", "differences", "plan_model"]
