"""Decoding and scoring with trained parameters: metrics, the best checkpoint, files of predictions.

The room holds batch evaluation (`evaluation`), inference to files (`inference`), decoding of typed
texts (`sampling`), the compiled functions that all of them run (`compiled_model`), perplexities
(`likelihoods`), what decoding costs (`costs`), lm-eval's tasks (`lm_eval_model`), candidates for
pass@k (`candidate_chunks`) and the tables of results (`results`). Commands, training, experiments
and benchmarks may import it. It calls models by `predict_batch_with_aux`, `score_batch_with_aux`
and `is_greedy_batch` alone: no loss, optimizer, corruption or sampler enters.
"""

from diffusion_t5x.evaluation.evaluation import InferenceEvaluator, evaluate

__all__ = ["InferenceEvaluator", "evaluate"]
