"""What a model is worth: decoding of tasks, metrics, and the choice of the best checkpoint."""

from diffusion_t5x.evaluation.evaluation import InferenceEvaluator, evaluate

__all__ = ["InferenceEvaluator", "evaluate"]
