"""The nouns of the library as protocols, with shapes, randomness and errors.

A model binds a network, an objective and a decoder (`models.Model`):

```
clean target ─ Corruption.corrupt ─► canvas ─ Network.forward ─► hidden ─ Network.logits ─► logits
                                       ▲                                                      │
        Corruption.prior ──────────────┤                             Objective.loss, Objective.score
                                       └── UpdateRule, StopRule ◄─ Readout ◄── Decoder.decode ┘
```

This is one page on purpose, though a long one: whoever writes a part reads what the others provide.
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
# name -> (weighted sum, sum of weights), so that sums over batches average exactly. Of a name
# 'X/by_Y' both are `[n]`, for n equal parts of [0, 1], in which Y lies.
Metrics: TypeAlias = Mapping[str, tuple[Array, Array]]
# The feature of a batch that marks fixed positions, [batch, length] int32, 0 or 1. Their tokens are
# those of `decoder_target_tokens`. It may be absent.
FIXED_FEATURE = "decoder_fixed_positions"


class Network(Protocol):
    """A network with its parameters and a batch of prefixes bound.

    Tests of the mathematics put a table of logits in its place.
    """

    @property
    def batch_size(self) -> int:
        """Number of prefixes, `batch` below."""

    @property
    def self_conditioning(self) -> bool:
        """Whether `forward` takes `conditioning`."""

    def forward(self, canvas: Array, rng: Array | None, conditioning: Array | None = None) -> Array:
        """Computes hidden states of `canvas [batch, length]` in one pass: `[batch, length, embed]`.

        Under a causal attention pattern the state at a position has seen the prefix and the tokens
        *before* that position, and predicts it; under a bidirectional one it has seen the whole
        canvas. With `Objective.shift` it is the state of the position before, or of the last prefix
        token, under any pattern. `rng` is the key for dropout; None where there is none.
        `conditioning [batch, length, embed]` is what `expect_embedding` returned for the pass
        before; None, or rows of 0, if there was none.
        """

    def expect_embedding(
        self, hidden: Array, logits_fn: Callable[[Array], Array] | None = None
    ) -> Array:
        """Averages tokens' embeddings by what `hidden [batch, length, embed]` predicts.

        `logits_fn` makes other logits than `logits` of it. The result is `[batch, length, embed]`,
        the conditioning of a next pass.
        """

    def logits(self, hidden: Array) -> Array:
        """Computes logits `[..., vocab]` float32 of hidden states `[..., embed]`.

        Tokens that the objective forbids (`Objective.forbidden`) have a logit so low that they are
        never drawn and weigh nothing.
        """

    def prefill(self, max_length: int, repeats: int) -> tuple[KVCache, Array]:
        """Reads the prefixes into a key-value cache, each `repeats` times; copies are neighbours.

        Returns:
          The cache, with room for `max_length` tokens after each prefix, and
          `[batch * repeats, embed]`, which predicts the first target token.
        """

    def append_token(self, cache: KVCache, tokens: Array) -> tuple[KVCache, Array]:
        """Appends `tokens [rows]`; also returns `[rows, embed]`, which predicts the next token."""

    def add_room(self, cache: KVCache, room: int) -> KVCache:
        """Returns the cache with room for `room` more tokens."""

    def as_causal(self) -> Network:
        """Returns the network under causal attention: what an AR model makes of the prefixes."""

    def read_text(self, targets: Array, rng: Array | None) -> tuple[Array, Array, Array]:
        """Reads prefixes and `targets [batch, length]` in one pass that predicts both.

        Returns:
          Hidden states `[batch, n + length, embed]`, the tokens that they predict, `[batch, n +
          length]`, of which the first `n` are those of prefixes, and whether there is such a token
          or only padding, bool.

        Raises:
          ValueError: if prefixes are read by an encoder.
        """

    def extend_prefix(self, tokens: Array, counts: Array) -> Network:
        """Returns the network with the first `counts [batch]` of `tokens [batch, length]` appended.

        Raises:
          ValueError: if the network's prefixes cannot be extended.
        """

    def drop_prefix(self, dropped: Array) -> Network:
        """Returns the network with empty prefixes in the rows where `dropped [batch]` is True.

        Raises:
          ValueError: if prefixes are cached already, or packed.
        """

    def repeat(self, n: int) -> Network:
        """Returns the network with every prefix repeated: row `i * n + j` has prefix `i`."""

    @property
    def caches_prefix(self) -> bool:
        """Whether `cache_prefix` is possible: prefixes do not depend on the canvas."""

    def cache_prefix(self, rng: Array | None = None) -> CachedNetwork:
        """Returns the network with keys and values of the prefixes computed once.

        `rng` is the key for dropout in the prefixes, which all passes then share; gradients of all
        passes flow into the one reading.

        Raises:
          ValueError: if they depend on the canvas under the objective's attention pattern.
        """

    def cache_blocks(
        self, tokens: Array, block_length: int, rng: Array | None = None
    ) -> CachedNetwork:
        """Returns the network that reads all blocks of texts in one pass, as if one by one.

        `tokens [batch, length]` are clean texts of whole blocks, read once, `rng` being the key for
        dropout. Canvases of the same length are blocks each of which sees the prefix, the clean
        blocks before it and itself.

        Raises:
          ValueError: if the network's prefixes cannot be extended and cached.
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

        The cache has room for them (`add_room`).

        Raises:
          ValueError: if earlier tokens would see later ones under the attention pattern.
        """


class Masses(NamedTuple):
    """What a token has become at a time, as probabilities that sum to 1; all of one shape."""

    clean: Array  # it is itself
    mask: Array  # it is the mask token
    uniform: Array  # it was drawn from all tokens that are no mask; it may be itself


class Corruption(Protocol):
    """The noise of a diffusion model: how a clean target becomes a canvas.

    Noise grows with time, from 0, a clean text, to 1, pure noise, unless `sample_times` stays in a
    part of that. Times broadcast to tokens, `[batch, length]`; most have a length of 1.
    """

    @property
    def vocab_size(self) -> int:
        """All tokens of the noise are below this one."""

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Tokens that only noise has, such as a mask token: no network may predict them."""

    def sample_times(self, rng: Array, batch_size: int, length: int) -> Array:
        """Draws times in [0, 1], float32: `[batch_size, 1]`, or one for each of `length` tokens."""

    def rate(self, times: Array) -> Array:
        """Returns the probability that a token is replaced by noise at `times`, of their shape."""

    def masses(self, times: Array) -> Masses:
        """Returns what tokens have become at `times`, each of their shape."""

    def corrupt(self, rng: Array, tokens: Array, times: Array) -> tuple[Array, Array]:
        """Corrupts clean targets, `tokens [batch, length]`.

        Returns:
          The canvas, and which positions were replaced by noise, bool, which may equal what it
          replaced; both `[batch, length]`.
        """

    def prior(self, rng: Array, shape: tuple[int, ...]) -> Array:
        """Draws pure noise, int32 of `shape`: the canvas at time 1."""

    def posterior(
        self, rng: Array, canvas: Array, clean: Array, times: Array, earlier: Array
    ) -> Array:
        """Draws what a canvas was at the times `earlier`, given what it is and its clean text.

        All tokens are int32 of one shape; the result is `clean` where `earlier` is 0.
        """

    def is_noise(self, tokens: Array) -> Array:
        """Marks tokens that can only be noise, bool of their shape; of uniform noise none is."""


class Score(NamedTuple):
    """What an objective says of given texts, `[batch]` float32 each, in nats for the whole text."""

    # The log-likelihood, or the estimate of a lower bound of it; higher is better.
    log_likelihood: Array
    error: Array  # standard error of the Monte Carlo estimate; 0 where the value is exact


class Objective(Protocol):
    """What is learned: the loss of a batch, and the score of given targets.

    Of its methods' arguments, `network` is bound to the batch's prefixes, `targets` are
    `[batch, length]` int32 and `weights` of that shape, float32.

    It may have two more attributes, for the adaptation of AR models: `shift`, True if a canvas
    position is predicted from the state of the position before; and `opening_steps`, the training
    steps in which attention opens from causal to `attention_pattern`, or 0.

    `loss` may take one more argument, `fixed [batch, length]` bool, which a model gives it for a
    batch that has fixed positions (infilling): they are clean in every canvas, and their weights
    are 0 already.
    """

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
        """Returns the weights that normalise and weigh the loss, given the batch's own."""

    def loss(
        self, network: Network, targets: Array, weights: Array, rng: Array
    ) -> tuple[Array, Array, Metrics]:
        """Computes the loss of a batch, with `weights` from `token_weights`.

        Args:
          rng: key for corruption, draws and dropout.

        Returns:
          The summed loss, the sum of weights, and metrics, each a pair of sums.
        """

    def score(self, network: Network, targets: Array, weights: Array, rng: Array) -> Score:
        """Bounds the log-likelihood of targets, with `weights` from `token_weights`.

        Args:
          rng: key for a Monte Carlo estimate; exact scores ignore it.
        """


class Readout(NamedTuple):
    """What one pass says about each position of canvases; every field is `[rows, length]`.

    Tokens are drawn from the distribution that logits rules and temperature leave. Probabilities
    are the network's own, without either, so that scores compare. All in nats but the margin.
    """

    drawn: Array  # a draw from softmax(ruled logits / temperature), int32; at temperature 0 argmax
    argmax: Array  # the likeliest token that the rules leave, int32; -1 before the first step
    drawn_log_prob: Array  # log-probability of `drawn`
    argmax_log_prob: Array  # log-probability of `argmax`
    # Log-probability of the token that the canvas has; -inf of tokens that no network predicts.
    canvas_log_prob: Array
    entropy: Array  # of the distribution that is drawn from; 0 at temperature 0
    # Probability of `argmax` less that of the likeliest other token that the rules leave; None
    # unless the update rule needs it.
    margin: Array | None = None


class Canvas(NamedTuple):
    """Canvases between two denoising steps; every field has a leading axis of rows."""

    tokens: Array  # [rows, length] int32, what the next step reads
    text: Array  # [rows, length] int32, what is returned if no further step is taken
    # [rows, length] float32, log-probability of each token of the canvas in the readout that it
    # was taken from; -inf for noise.
    certainty: Array
    score: Array  # [rows] float32, in nats, higher is better; -inf before the first step
    readout: Readout  # that of the last step
    done: Array  # [rows] bool; a canvas that is done no longer changes
    used: Array  # [rows] int32, the length up to which the canvas is still computed
    # [rows, num_steps + 1, length] int32, the canvas before the first step and after each one;
    # None unless asked for.
    trajectory: Array | None
    # [rows, length, embed], what the last step predicted, for the next one; 0 before the first.
    # None if the network takes none.
    conditioning: Array | None = None


class StepView(NamedTuple):
    """What update and stop rules see of a denoising step."""

    canvas: Canvas  # what the step read; its `readout` and `score` are those of the step before
    readout: Readout  # that of this step
    step_index: Array  # scalar int32, 0 for the first step
    num_steps: int  # the number of steps, unless all canvases are done before


class Fixed(NamedTuple):
    """Positions of a text that are given, and are not decoded; both fields `[batch, length]`."""

    tokens: Array  # int32, read only where `where` is True
    where: Array  # bool


class LogitsRule(Protocol):
    """Changes the distribution that tokens are drawn from, by its logits.

    It may have an attribute `tokens`, those that it names, which must be of the vocabulary.
    """

    def __call__(self, logits: Array, temperature: Array | float) -> Array:
        """Returns other logits `[..., vocab]` float32, -inf for tokens that are never drawn.

        Args:
          logits: before they are divided by the temperature; some may be -inf.
          temperature: of the draw that follows, scalar; a Python 0 for the argmax.
        """


class UpdateRule(Protocol):
    """What a denoising step writes into canvases, given what the network says about them.

    It may have more attributes, each False where missing: `needs_margin`, to get `Readout.margin`;
    `keeps_text`, so that canvases which a stop rule ends keep the rule's text, not the argmax; and
    `finishes`, if it sets `done` in canvases that no further step would change. And it may have a
    method `check(corruption)`, which raises ValueError if it cannot do with that.
    """

    def __call__(self, step: StepView, rng: Array, corruption: Corruption) -> tuple[Canvas, Array]:
        """Updates canvases; `rng` is for the rule's own draws, `corruption` is the decoder's.

        Returns:
          `step.canvas` with other `tokens`, `text` and `certainty`, and the scores `[rows]` of
          the canvases in nats.
        """


class StopRule(Protocol):
    """When a canvas is done before its steps are over."""

    def __call__(self, step: StepView, score: Array) -> Array:
        """Returns which canvases are done, `[rows]` bool, given their scores after the step."""


class Decoded(NamedTuple):
    """What a decoder returns."""

    tokens: Array  # [batch, num_samples, length] int32, best sample last
    scores: Array  # [batch, num_samples] float32 in nats, ascending
    # [batch, num_samples, num_steps + 1, length] int32, the canvas before the first step and after
    # each one; None unless asked for.
    trajectory: Array | None = None
    # [batch] int32, forward passes over canvases of an example, all samples together; samples
    # decoded beside others of a batch count until the last of the batch is done. None where passes
    # are not counted.
    passes: Array | None = None
    # [batch] int32, canvas positions in those passes, and those of blocks that joined the prefix;
    # other positions of prefixes are not counted.
    positions: Array | None = None
    # [batch] int32, passes that had to wait for one another: denoising steps, or tokens of an AR
    # decoder; counted as `passes` are.
    steps: Array | None = None


class Decoder(Protocol):
    """How text is generated: a frozen dataclass, whose fields gin binds and calls may override."""

    def decode(
        self,
        network: Network,
        length: int,
        rng: Array,
        return_trajectory: bool = False,
        fixed: Fixed | None = None,
    ) -> Decoded:
        """Decodes texts of at most `length` tokens for the prefixes of `network`.

        Args:
          rng: key for all draws.
          return_trajectory: keep the canvas of every step.
          fixed: positions that are given; every sample and every canvas has their tokens.

        Raises:
          ValueError: if there is no trajectory to return, positions cannot be fixed, or the network
            cannot do what the decoder's settings need; the message names the setting.
        """


class SteppedDecoder(Decoder, Protocol):
    """A decoder whose steps all have the same shapes, so that each may run in another process.

    `start`, then `count_steps` times `step`, then `finish` decode what `decode` does with the same
    key, its passes and positions left out. A state is a tree of arrays.
    """

    def count_steps(self, length: int) -> int:
        """Returns how many steps texts of `length` tokens take.

        Raises:
          ValueError: if they cannot be taken apart; the message names the setting.
        """

    def start(
        self, network: Network, length: int, rng: Array, fixed: Fixed | None = None
    ) -> tuple[Network | None, Any]:
        """Begins; returns the network that steps read, or None if the state has all, and a state.

        Only the parameters of a network returned as None are bound again for `step`.
        """

    def step(self, network: Network, state: Any, rng: Array) -> Any:
        """Returns the next state; `rng` is that of `start`."""

    def finish(self, state: Any) -> Decoded:
        """Returns the texts of a state, best last."""


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

    def is_trained(self, name: str) -> bool:
        """Returns whether a parameter, by a name such as 'encoder/final_norm/scale', is trained."""

    def loss_fn(
        self,
        params: Any,
        batch: Mapping[str, Array],
        dropout_rng: Array | None,
        step: Array | None = None,
    ) -> tuple[Array, Any]:
        """Computes the training loss, a scalar, and metrics.

        `step` counts the run's steps before this one, those of an initial checkpoint left out.
        """

    def eval_fn(self, params: Any, batch: Mapping[str, Array]) -> tuple[Array, Any]:
        """Computes the loss and metrics without dropout, its randomness fixed by the batch."""

    def loss_normalization(self, batch: Mapping[str, Array]) -> Array:
        """Computes the scalar that the summed loss of `batch` was divided by."""
