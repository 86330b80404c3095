"""ADED: adaptive draft-verification (arXiv 2407.12021, AAAI 2025; also called Adaptix).

No network drafts. A table of trigrams, counted over a corpus, scores what may follow the last two tokens; the
scores of the trigrams that the row itself produces grow as it is decoded; and a short Monte-Carlo tree search
with a PUCT rule picks a diverse set of continuations, which one call of the target checks.

Score of w3 after (w1, w2), n times in the window of the row's own text:

    P(w3 | w1, w2) = min(cap, count(w1 w2 w3) / count(w1 w2) + gain * n)

It is not normalised again, so it is a score and not the q of an acceptance test: drafts are fixed by the
context. n is kept per place of the text (`hits`), so no table is written while decoding.

Where the paper leaves room: the root is not one of the `paths` drafted; a search node has at most `successors`
children, the best by the present scores (the authors' table grows without a limit); a leaf that is expanded
hands the visit to the last of its children, which are in order of their scores.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from research.data.text import TokenDataset
from research.decoding.proposers import Outcome, Prompt, Round, Target
from research.decoding.tree import dynamic_tree
from research.decoding.verify import Draft
from research.errors import UserError


class Table(struct.PyTreeNode):
    """Successors of bigrams, sorted, as compressed rows.

    first int32[V + 1]: bigrams that begin with token a are first[a] .. first[a + 1] - 1; second int32[E]: their
    second tokens, ascending; begin int32[E + 1]: successors of bigram e are begin[e] .. begin[e + 1] - 1; token
    int32[T] and score float32[T] of each, the most probable first.
    """

    first: jax.Array
    second: jax.Array
    begin: jax.Array
    token: jax.Array
    score: jax.Array

    def successors(self, a: jax.Array, b: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
        """Bigrams int32[Q] -> tokens int32[Q, width] and scores float32[Q, width], 0 where there are fewer."""
        low, high = self.first[a], self.first[a + 1]

        def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = bounds
            middle = (low + high) // 2
            below = self.second[middle] < b
            searching = low < high
            return (
                jnp.where(searching & below, middle + 1, low),
                jnp.where(searching & ~below, middle, high),
            )

        at, _ = jax.lax.fori_loop(0, len(self.second).bit_length(), halve, (low, high))
        found = (at < self.first[a + 1]) & (self.second[jnp.minimum(at, len(self.second) - 1)] == b)
        at = jnp.where(found, at, 0)
        place = self.begin[at][:, None] + jnp.arange(width)
        inside = found[:, None] & (place < self.begin[at + 1][:, None])
        place = jnp.minimum(place, len(self.token) - 1)
        return self.token[place], jnp.where(inside, self.score[place], 0.0)


def count_trigrams(rows: Iterable[Mapping[str, np.ndarray]], vocab_size: int, successors: int = 12) -> Table:
    """The table of a corpus: rows with `tokens` and `segments` int32[..., T] (0 is padding), the `successors` most
    frequent continuations of every bigram, ties to the smaller token.

    Raises:
        UserError: no three tokens in a row.
    """
    codes = []
    for row in rows:
        tokens, segments = row["tokens"].astype(np.int64), row["segments"]
        together = (segments[..., 2:] == segments[..., :-2]) & (segments[..., 2:] > 0)
        code = (tokens[..., :-2] * vocab_size + tokens[..., 1:-1]) * vocab_size + tokens[..., 2:]
        codes.append(code[together])
    trigrams, counts = np.unique(
        np.concatenate(codes) if codes else np.zeros(0, np.int64), return_counts=True
    )
    if not len(trigrams):
        raise UserError("the corpus holds no three tokens in a row: there is nothing to count")
    order = np.lexsort((trigrams, -counts, trigrams // vocab_size))  # by bigram, then by falling count
    trigrams, counts = trigrams[order], counts[order]
    bigrams, begin, group = np.unique(trigrams // vocab_size, return_index=True, return_inverse=True)
    kept = np.arange(len(trigrams)) - begin[group] < successors
    score = counts / np.add.reduceat(counts, begin)[group]
    number = np.bincount(group[kept], minlength=len(bigrams))
    return Table(
        first=jnp.asarray(np.searchsorted(bigrams // vocab_size, np.arange(vocab_size + 1)), jnp.int32),
        second=jnp.asarray(bigrams % vocab_size, jnp.int32),
        begin=jnp.asarray(np.concatenate([[0], np.cumsum(number)]), jnp.int32),
        token=jnp.asarray(trigrams[kept] % vocab_size, jnp.int32),
        score=jnp.asarray(score[kept], jnp.float32),
    )


class Text(struct.PyTreeNode):
    """What a row has produced: tokens int32[B, L], how many int32[B] (the root not yet among them), and at each
    place how often the trigram that ends there was in the window, float32[B, L]."""

    tokens: jax.Array
    length: jax.Array
    hits: jax.Array


@dataclasses.dataclass(frozen=True)
class ADED:
    """The drafter; its parameters are a `Table`.

    Args:
        corpus, records: the table counts the first `records` rows of 256 tokens of the training split of this
            source (`research.data.sources`), shuffled.
        tokenizer: of the corpus, as for `TokenDataset`: it must be the target's.
        iterations: of the search.
        depth: nodes on a searched path, the root included; a draft is one token longer than its path below
            the root, by the most probable successor.
        paths: most visited paths that are drafted.
        nodes: tokens drafted at most; the shallow ones stay.
        successors: children of a search node.
        window, gain, cap: the last `window` tokens of the text raise the scores of their trigrams by `gain` before
            every draft, up to `cap`. A gain of 0 leaves the corpus's table as it is.
        exploration, offset: c1 and c2 of the PUCT rule.
    """

    corpus: str = "builtin"
    records: int = 8192
    tokenizer: str | None = None
    iterations: int = 150
    depth: int = 4
    paths: int = 24
    nodes: int = 64
    successors: int = 12
    window: int = 16
    gain: float = 0.04
    cap: float = 3.0
    exploration: float = 32.0
    offset: float = 8.0

    def __post_init__(self):
        for name, least in {
            "records": 1,
            "iterations": 1,
            "depth": 2,
            "paths": 1,
            "nodes": 1,
            "successors": 2,
            "window": 3,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"ADED.{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def size(self) -> int:
        return self.nodes + 1

    @property
    def levels(self) -> int:
        return self.depth + 1

    def create(self, key: jax.Array, target: Target) -> Table:
        """The table of the corpus; counted on the host, so not traceable. `key` is not used.

        Raises:
            UserError: the tokenizer has another vocabulary than the target.
        """
        data = TokenDataset(self.corpus, length=256, tokenizer=self.tokenizer)
        size, wanted = data.tokenizer.vocab_size, target.model.vocab_size
        if size != wanted:
            raise UserError(
                f"ADED: its corpus has a vocabulary of {size} tokens, and the target has {wanted}"
            )
        rows = data.take(np.arange(min(self.records, len(data))))
        return count_trigrams([rows], wanted, self.successors)

    def init(self, params: Table, target: Target, prompt: Prompt) -> Text:
        room = prompt.capacity + self.levels - prompt.tokens.shape[1]
        tokens = jnp.pad(prompt.tokens, ((0, 0), (0, max(room, 0))))
        return Text(tokens, prompt.lengths, jnp.zeros(tokens.shape, jnp.float32))

    def propose(self, params: Table, target: Target, state: Text, round: Round) -> tuple[Draft, Text]:
        place = jnp.arange(state.tokens.shape[1])
        tokens = jnp.where(place == state.length[:, None], round.root[:, None], state.tokens)
        length = state.length + 1
        seen = (place >= jnp.maximum(length[:, None] - self.window + 2, 2)) & (place < length[:, None])
        hits = state.hits + seen
        draft, parent, real = jax.vmap(self._draft, in_axes=(None, 0, 0, 0, 0))(
            params, tokens, length, hits, round.keys
        )
        tree = dynamic_tree(parent, real, levels=self.levels, width=self.nodes)
        return Draft(draft, tree), state.replace(tokens=tokens, hits=hits)

    def observe(self, params: Table, target: Target, state: Text, outcome: Outcome) -> Text:
        accept = outcome.accept
        along = jnp.take_along_axis(outcome.draft.tokens, accept.path, axis=1)
        offset = jnp.arange(state.tokens.shape[1]) - state.length[:, None]
        chosen = jnp.take_along_axis(along, jnp.clip(offset, 0, self.levels - 1), axis=1)
        inside = (offset >= 0) & (offset < accept.count[:, None])
        return state.replace(
            tokens=jnp.where(inside, chosen, state.tokens), length=state.length + accept.count
        )

    # One row from here on: text int32[L] of `length` tokens, the root its last.

    def _draft(
        self, table: Table, text: jax.Array, length: jax.Array, hits: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """-> tokens, parents int32[N] and real bool[N] of the drafted tree."""
        own = _OwnTrigrams.of(text, length, hits)
        token, prior = self._levels(table, own, text[jnp.maximum(length - 2, 0)], text[length - 1], length)
        visits, expanded = self._search(prior, key)
        chosen, marked = self._chosen(visits, expanded, prior)
        # A path that ends at the deepest level is extended by a lookup, the others by a child of theirs.
        above = token[jnp.maximum(_parent(chosen, self.successors), 0)]
        longer, score = self._successors(table, own, above, token[chosen])
        deepest = marked[chosen] & (chosen >= self._nodes(self.depth - 2))
        nodes = self._nodes(self.depth - 1)
        all_token = jnp.concatenate([token, longer[:, 0]])
        all_parent = jnp.concatenate([_parent(jnp.arange(nodes), self.successors), chosen])
        marked = jnp.concatenate([marked, deepest & (score[:, 0] > 0)])
        depth = jnp.concatenate([jnp.asarray(self._depths()), jnp.full((len(chosen),), self.depth)])
        order = jnp.concatenate([visits, jnp.zeros((len(chosen),))]) - depth * (self.iterations + 1.0)
        best, picked = jax.lax.top_k(jnp.where(marked, order, -jnp.inf), self.nodes)
        real = best > -jnp.inf
        slot = (
            jnp.zeros((len(all_token),), jnp.int32)
            .at[jnp.where(real, picked, len(all_token))]
            .set(jnp.arange(1, self.nodes + 1, dtype=jnp.int32), mode="drop")
        )  # where each drafted node went; the root stays 0
        parent = jnp.where(real, slot[jnp.maximum(all_parent[picked], 0)], 0)
        return (
            jnp.concatenate([text[length - 1][None], jnp.where(real, all_token[picked], 0)]),
            jnp.concatenate([jnp.full((1,), -1, jnp.int32), parent]),
            jnp.concatenate([jnp.ones((1,), bool), real]),
        )

    def _nodes(self, depth: int) -> int:
        """Nodes of the full tree down to `depth`; node i has children i * successors + 1 and the next ones."""
        return sum(self.successors**d for d in range(depth + 1))

    def _depths(self) -> np.ndarray:
        return np.repeat(np.arange(self.depth), [self.successors**d for d in range(self.depth)])

    def _levels(
        self, table: Table, own: "_OwnTrigrams", before: jax.Array, root: jax.Array, length: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Token int32 and score float32 of every node of the full tree; a score of 0 is no node."""
        tokens, scores = [root[None]], [jnp.ones((1,))]
        above, here = before[None], root[None]
        for _ in range(self.depth - 1):
            token, score = self._successors(table, own, above, here)
            score = jnp.where(scores[-1][:, None] > 0, score, 0.0)
            above, here = jnp.repeat(here, self.successors), token.reshape(-1)
            tokens.append(here)
            scores.append(score.reshape(-1))
        known = length >= 2  # one token is no bigram
        return jnp.concatenate(tokens), jnp.where(known, jnp.concatenate(scores), 0.0)

    def _successors(
        self, table: Table, own: "_OwnTrigrams", a: jax.Array, b: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Bigrams int32[Q] -> their best tokens and scores [Q, successors], table and own text together."""
        token, score = table.successors(a, b, self.successors)
        match = own.entry & (own.first == a[:, None]) & (own.second == b[:, None])  # [Q, L]
        same = match[:, None, :] & (token[..., None] == own.third)  # [Q, W, L]
        raised = score + self.gain * jnp.sum(jnp.where(same, own.total, 0.0), axis=-1)
        raised = jnp.where(score > 0, jnp.minimum(raised, self.cap), 0.0)
        listed = jnp.any(same & (score > 0)[..., None], axis=1)
        new = jnp.where(match & ~listed, jnp.minimum(self.gain * own.total, self.cap), 0.0)
        third = jnp.broadcast_to(own.third, match.shape)
        best, at = jax.lax.top_k(jnp.concatenate([raised, new], axis=1), self.successors)
        return jnp.take_along_axis(jnp.concatenate([token, third], axis=1), at, axis=1), best

    def _search(self, prior: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Visits float32[M] of every node, and whether its children were made, bool[M]."""
        width, levels, nodes = self.successors, self.depth - 1, len(prior)
        noise = jax.random.gumbel(key, (self.iterations, levels, width))
        weight = jnp.log(prior)  # -inf where there is no node

        def iteration(i: jax.Array, carry: tuple) -> tuple:
            visits, total, expanded = carry
            node, value = jnp.int32(0), jnp.float32(1.0)
            inside = some = jnp.bool_(True)  # the searched tree; a path that still goes on
            path = [node]
            for level in range(levels):
                children = node * width + 1 + jnp.arange(width)
                exist = some & (prior[children] > 0)
                some = jnp.any(exist)
                own = visits[node]
                mean = total[children] / jnp.maximum(visits[children], 1.0)
                bonus = self.exploration + jnp.log((own + self.offset + 1) / self.offset)
                puct = mean + bonus * prior[children] * jnp.sqrt(own) / (1 + visits[children])
                puct = jnp.where(visits[children] == 0, jnp.inf, puct)
                select = jnp.argmax(jnp.where(exist, puct, -jnp.inf))
                last = jnp.sum(exist) - 1  # the children are in order of their scores
                rolled = jnp.argmax(weight[children] + noise[i, level])
                grow = inside & ~expanded[node] & some
                descend = inside & expanded[node] & some
                expanded = expanded.at[node].set(expanded[node] | grow)
                chosen = children[jnp.where(descend, select, jnp.where(grow, last, rolled))]
                # Below the searched tree the path goes on as a roll-out, which leaves no visit.
                path.append(jnp.where(descend | grow, chosen, nodes))
                node = jnp.where(some, chosen, node)
                value += jnp.where(some, prior[chosen], 0.0)
                inside = descend
            visited = jnp.stack(path)
            return (
                visits.at[visited].add(1.0, mode="drop"),
                total.at[visited].add(value, mode="drop"),
                expanded,
            )

        zeros = jnp.zeros((nodes,))
        visits, _, expanded = jax.lax.fori_loop(
            0, self.iterations, iteration, (zeros, zeros, jnp.zeros((nodes,), bool))
        )
        return visits, expanded

    def _chosen(
        self, visits: jax.Array, expanded: jax.Array, prior: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The ends int32[paths] of the most visited paths, and bool[M] of the nodes they draft: themselves, those
        above, and the best successor of each."""
        width, nodes = self.successors, len(prior)
        made = jnp.concatenate([jnp.zeros((1,), bool), jnp.repeat(expanded[: (nodes - 1) // width], width)])
        made &= prior > 0
        count, ends = jax.lax.top_k(jnp.where(made, visits, -1.0), min(self.paths, nodes))
        marked = jnp.zeros((nodes,), bool).at[jnp.where(count >= 0, ends, nodes)].set(True, mode="drop")
        ends = jnp.where(count >= 0, ends, 0)
        child = ends * width + 1  # the first child is the most probable
        extends = (count >= 0) & (child < nodes) & (prior[jnp.minimum(child, nodes - 1)] > 0)
        marked = marked.at[jnp.where(extends, child, nodes)].set(True, mode="drop")
        for _ in range(self.depth - 2):
            below = jnp.any(marked[1:].reshape(-1, width), axis=1)
            marked = marked.at[: len(below)].set(marked[: len(below)] | below)
        return ends, marked.at[0].set(False)


class _OwnTrigrams(struct.PyTreeNode):
    """The trigrams of a row's text, [L]: their tokens, which ends where; `entry` marks the first place of each
    that was in the window, `total` how often it was."""

    first: jax.Array
    second: jax.Array
    third: jax.Array
    entry: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, text: jax.Array, length: jax.Array, hits: jax.Array) -> "_OwnTrigrams":
        place = jnp.arange(len(text))
        inside = (place >= 2) & (place < length)
        first, second = jnp.roll(text, 2), jnp.roll(text, 1)
        same = inside & inside[:, None]
        for word in (first, second, text):
            same &= word == word[:, None]
        total = jnp.where(same, hits, 0.0).sum(1)
        return cls(first, second, text, inside & (jnp.argmax(same, axis=1) == place) & (total > 0), total)


def _parent(node: jax.Array, width: int) -> jax.Array:
    return (node - 1) // width
