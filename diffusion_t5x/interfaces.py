"""The nouns of the library as protocols, with shapes, randomness and errors.

A model binds a network, an objective and a decoder (`models.Model`):

```
clean target ─ Corruption.corrupt ─► canvas ─ Network.forward ─► hidden ─ Network.logits ─► logits
                                       ▲                                                      │
        Corruption.prior ──────────────┤                             Objective.loss, Objective.score
                                       └── UpdateRule, StopRule ◄─ Readout ◄── Decoder.decode ┘
```

Anything with these methods will do: nothing here is a base class, and nothing is registered. An
objective with its own noise, loss, likelihood bound and sampler is one Python file and one gin file
(`docs/extending.md`).

Shapes: `batch` counts prefixes and targets; `rows` is `batch * n`, for `n` canvases of each prefix,
which are neighbours. Tokens are int32, and 0 is padding; logits and scores are float32, in nats.
Randomness: a function that draws takes a key of its own (`jax.random`), and no key is used twice;
equal keys give equal results on any number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax

Array: TypeAlias = jax.Array
# What a network keeps of the tokens that it has read. Only networks look inside.
KVCache: TypeAlias = Any
# name -> (weighted sum, sum of weights), so that sums over batches average exactly.
Metrics: TypeAlias = Mapping[str, tuple[Array, Array]]
# (key, shape) -> tokens of pure noise, int32 of that shape: `Corruption.prior`.
Prior: TypeAlias = Callable[[Array, tuple[int, ...]], Array]


class Network(Protocol):
    """A network with its parameters and a batch of prefixes bound.

    Tests of the mathematics put a table of logits in its place.
    """

    @property
    def batch_size(self) -> int:
        """Number of prefixes, `batch` below."""

    def forward(self, canvas: Array, rng: Array | None) -> Array:
        """Computes hidden states of all positions in one pass under the objective's attention.

        Under a causal pattern the state at a position has seen the prefix and the tokens *before*
        that position, and predicts it; under a bidirectional one it has seen the whole canvas.

        Args:
          canvas: `[batch, length]` int32, target tokens or canvas.
          rng: key for dropout; None where there is none.

        Returns:
          `[batch, length, embed]`.
        """

    def logits(self, hidden: Array) -> Array:
        """Computes logits `[..., vocab]` float32 of hidden states `[..., embed]`.

        Tokens that the objective forbids (`Objective.forbidden`) have a logit so low that they are
        never drawn and weigh nothing.
        """

    def prefill(self, max_length: int, repeats: int) -> tuple[KVCache, Array]:
        """Reads the prefixes into a key-value cache.

        Args:
          max_length: tokens that the cache has room for after each prefix.
          repeats: copies of each row, neighbours.

        Returns:
          The cache, and `[batch * repeats, embed]`, which predicts the first target token.
        """

    def append_token(self, cache: KVCache, tokens: Array) -> tuple[KVCache, Array]:
        """Appends `tokens [rows]` to a cache.

        Returns:
          The cache, and `[rows, embed]`, which predicts the next token.
        """

    def add_room(self, cache: KVCache, room: int) -> KVCache:
        """Returns the cache with room for `room` more tokens."""

    def extend_prefix(self, tokens: Array, counts: Array) -> Network:
        """Returns the network with longer prefixes.

        Args:
          tokens: `[batch, length]` int32.
          counts: `[batch]` int32, how many of each row's tokens follow its prefix.

        Raises:
          ValueError: if the network's prefixes cannot be extended.
        """

    def repeat(self, n: int) -> Network:
        """Returns the network with every prefix repeated: row `i * n + j` has prefix `i`."""

    def cache_prefix(self) -> CachedNetwork:
        """Returns the network with keys and values of the prefixes computed once.

        Raises:
          ValueError: if they depend on the canvas under the objective's attention pattern.
        """


class CachedNetwork(Network, Protocol):
    """A network whose prefixes are cached; `forward` takes any number of rows per prefix."""

    @property
    def cache(self) -> KVCache:
        """Keys and values of the `batch` prefixes."""

    def with_cache(self, cache: KVCache) -> CachedNetwork:
        """Returns the network with other cached prefixes."""

    def repeat(self, n: int) -> CachedNetwork:
        """Returns the network for `n` rows per prefix; the cache is shared, not copied."""

    def append_tokens(self, cache: KVCache, tokens: Array) -> KVCache:
        """Appends `tokens [batch, length]` to each prefix, as if they had always been there.

        Args:
          cache: has room for them (`add_room`).
          tokens: int32.

        Raises:
          ValueError: if earlier tokens would see later ones under the attention pattern.
        """


class Corruption(Protocol):
    """The noise of a diffusion model: how a clean target becomes a canvas."""

    @property
    def vocab_size(self) -> int:
        """All tokens of the noise are below this one."""

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Tokens that only noise has, such as a mask token: no network may predict them."""

    def sample_rate(self, rng: Array, batch_size: int) -> Array:
        """Draws corruption rates `[batch_size]` float32 in [0, 1], one per example."""

    def corrupt(self, rng: Array, tokens: Array, rate: Array) -> tuple[Array, Array]:
        """Corrupts a clean target.

        Args:
          rng: key for positions and noise.
          tokens: `[batch, length]` int32.
          rate: `[batch]` float32.

        Returns:
          The canvas, `[batch, length]` int32, and which positions were replaced by noise, bool of
          the same shape; noise may equal what it replaced.
        """

    def prior(self, rng: Array, shape: tuple[int, ...]) -> Array:
        """Draws pure noise, int32 of `shape`: the canvas at corruption rate 1."""


class Objective(Protocol):
    """What is learned: the loss of a batch, and the score of given targets."""

    @property
    def attention_pattern(self) -> str:
        """One of `objectives.attention_patterns.ATTENTION_PATTERNS`."""

    @property
    def packs(self) -> bool:
        """Several texts may share a row, and padding has no loss; False for padded canvases."""

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Tokens that are never predicted: those of the corruption, if there is one."""

    def token_weights(self, targets: Array, weights: Array) -> Array:
        """Returns the loss weights `[batch, length]` that normalise and weigh the loss.

        Args:
          targets: `[batch, length]` int32.
          weights: `[batch, length]` float32, the batch's own.
        """

    def loss(
        self, network: Network, targets: Array, weights: Array, rng: Array
    ) -> tuple[Array, Array, Metrics]:
        """Computes the loss of a batch.

        Args:
          network: bound to the batch's prefixes.
          targets: `[batch, length]` int32.
          weights: `[batch, length]` float32, from `token_weights`.
          rng: key for corruption, draws and dropout.

        Returns:
          The summed loss, the sum of weights, and metrics, each a pair of sums.
        """

    def score(self, network: Network, targets: Array, weights: Array, rng: Array) -> Array:
        """Scores given targets: `[batch]` float32 in nats, higher is better.

        Args:
          network: bound to the batch's prefixes.
          targets: `[batch, length]` int32.
          weights: `[batch, length]` float32, from `token_weights`.
          rng: key for a Monte Carlo estimate; exact scores ignore it.
        """


class Readout(NamedTuple):
    """What one pass says about each position of canvases; every field is `[rows, length]`.

    Probabilities are the network's own, at temperature 1; log-probabilities and entropy in nats.

    Attributes:
      drawn: a draw from softmax(logits / temperature), int32; the argmax at temperature 0.
      argmax: the likeliest token, int32; -1 before the first step.
      drawn_log_prob: log-probability of `drawn`.
      argmax_log_prob: log-probability of `argmax`.
      canvas_log_prob: log-probability of the token that the canvas has.
      entropy: entropy of the distribution.
    """

    drawn: Array
    argmax: Array
    drawn_log_prob: Array
    argmax_log_prob: Array
    canvas_log_prob: Array
    entropy: Array


class Canvas(NamedTuple):
    """Canvases between two denoising steps; every field has a leading axis of rows.

    Attributes:
      tokens: `[rows, length]` int32, what the next step reads.
      text: `[rows, length]` int32, what is returned if no further step is taken.
      certainty: `[rows, length]` float32, log-probability of each token of the canvas in the
        readout that it was taken from; -inf for noise.
      score: `[rows]` float32, in nats, higher is better; -inf before the first step.
      readout: the readout of the last step.
      done: `[rows]` bool; a canvas that is done no longer changes.
      used: `[rows]` int32, the length up to which the canvas is still computed.
      trajectory: `[rows, num_steps + 1, length]` int32, the canvas before the first step and after
        each one; None unless asked for.
    """

    tokens: Array
    text: Array
    certainty: Array
    score: Array
    readout: Readout
    done: Array
    used: Array
    trajectory: Array | None


class StepView(NamedTuple):
    """What update and stop rules see of a denoising step.

    Attributes:
      canvas: the canvases that the step read; `canvas.readout` and `canvas.score` are those of the
        step before.
      readout: the readout of this step.
      step_index: scalar int32, 0 for the first step.
      num_steps: the number of steps, unless all canvases are done before.
    """

    canvas: Canvas
    readout: Readout
    step_index: Array
    num_steps: int


class UpdateRule(Protocol):
    """What a denoising step writes into canvases, given what the network says about them."""

    def __call__(self, step: StepView, rng: Array, prior: Prior) -> tuple[Canvas, Array]:
        """Updates canvases.

        Args:
          step: the step.
          rng: key for the rule's own draws.
          prior: draws fresh noise.

        Returns:
          `step.canvas` with other `tokens`, `text` and `certainty`, and the scores `[rows]` of
          the canvases in nats.
        """


class StopRule(Protocol):
    """When a canvas is done before its steps are over."""

    def __call__(self, step: StepView, score: Array) -> Array:
        """Returns which canvases are done: `[rows]` bool.

        Args:
          step: the step.
          score: `[rows]`, the scores after the step.
        """


class Decoded(NamedTuple):
    """What a decoder returns.

    Attributes:
      tokens: `[batch, num_samples, length]` int32, best sample last.
      scores: `[batch, num_samples]` float32 in nats, ascending.
      trajectory: `[batch, num_samples, num_steps + 1, length]` int32, the canvas before the first
        step and after each one; None unless asked for.
      passes: `[batch]` int32, forward passes over canvases of an example, all samples together;
        samples decoded beside others of a batch count until the last of the batch is done. None
        where passes are not counted.
      positions: `[batch]` int32, canvas positions in those passes, and those of blocks that joined
        the prefix; other positions of prefixes are not counted.
    """

    tokens: Array
    scores: Array
    trajectory: Array | None = None
    passes: Array | None = None
    positions: Array | None = None


class Decoder(Protocol):
    """How text is generated: a frozen dataclass, whose fields gin binds and calls may override."""

    def decode(
        self, network: Network, length: int, rng: Array, return_trajectory: bool = False
    ) -> Decoded:
        """Decodes texts for a batch of prefixes.

        Args:
          network: bound to `batch` prefixes.
          length: most tokens per text.
          rng: key for all draws.
          return_trajectory: keep the canvas of every step.

        Raises:
          ValueError: if there is no trajectory to return, or the network cannot do what the
            decoder's settings need; the message names the setting.
        """


class Model(Protocol):
    """What training asks of a model: T5X's contract, implemented by `models.Model`.

    Metrics are clu's, which merge over batches. `optimizer_def` belongs to the trainer,
    vocabularies and the feature converter to SeqIO; `module` is a flax module.
    """

    module: Any
    objective: Objective
    decoder: Decoder
    optimizer_def: Any
    input_vocabulary: Any
    output_vocabulary: Any

    @property
    def FEATURE_CONVERTER_CLS(self) -> Callable[..., Any]:
        """The SeqIO feature converter that makes the model's batches."""

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Initialises 'params', and 'params_axes' with their logical axes."""

    def loss_fn(
        self, params: Any, batch: Mapping[str, Array], dropout_rng: Array | None
    ) -> tuple[Array, Any]:
        """Computes the training loss, a scalar, and metrics."""

    def eval_fn(self, params: Any, batch: Mapping[str, Array]) -> tuple[Array, Any]:
        """Computes the loss and metrics without dropout, its randomness fixed by the batch."""

    def loss_normalization(self, batch: Mapping[str, Array]) -> Array:
        """Computes the scalar that the summed loss of `batch` was divided by."""
