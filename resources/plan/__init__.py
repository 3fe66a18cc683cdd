"""What optimizing a model would do now, and why."""

from resources.plan.planner import plan_model
from resources.plan.reasons import differences
from resources.plan.steps import ModelPlan, PlannedStep, State

__all__ = ["ModelPlan", "PlannedStep", "State", "differences", "plan_model"]
