"""A smaller token table: tokens that the data never uses go, or the table becomes a product of two thin ones.

Most of a small encoder's parameters are in its token table, and a shop's texts use a fraction of the tokens
(vocabulary trimming: Abdaoui et al., "Load What You Need", SustaiNLP 2020; Ushio et al., EMNLP Findings 2023).
Factorized tables as in ALBERT (Lan et al., ICLR 2020), from a pretrained one by singular value decomposition.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from tokenizers import Tokenizer, models
from torch import nn

from netweight.encode import TextEncoder
from netweight.errors import ModelError, OptionError
from netweight.layers import FactoredEmbedding, put
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Run
from netweight.techniques.base import transformer
from netweight.techniques.static import TokenCounts
from netweight.train import Plan

_KINDS = ("WordPiece", "WordLevel", "BPE", "Unigram")


@dataclass(frozen=True)
class Vocab:
    """Drop the tokens that training rows and pool use fewer than `least` times, but for the first `common`: learned
    vocabularies number their tokens by how common they are in the texts that they were learned from, and texts to come
    may use those. Places held for words to come, as BERT's [unused0], go: no text gives them.

    Special and added tokens stay, and so does what any text falls back to: single characters, bytes and their
    continuations. A text whose tokens all stay keeps its tokens, and so its outputs, exactly; any other falls apart
    into smaller pieces. One case is apart: a word that was unknown to WordPiece may become known, where one of its
    characters has a token only as part of others. Ids change, so models that share a tokenizer, as the tiers of an
    artifact do, are made from the result.

    Raises ModelError for a tokenizer whose model is not WordPiece, WordLevel, BPE or Unigram, or that has no token for
    what is unknown, and OptionError where nothing would go.
    """

    least: int = 1
    common: int = 0

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = transformer(model, "Vocab")
        if self.least < 1:
            raise OptionError(f"least is {self.least}; use 1 (drop what never occurs) or more.")
        if self.common < 0:
            raise OptionError(f"common is {self.common}; use 0 (keep nothing but what occurs) or more.")
        old = model.encoder
        counts = run.reduce(model, TokenCounts(old.vocabulary), unlabelled=True)["tokens"]
        used = set((counts >= self.least).nonzero().flatten().tolist()) | set(first_words(old.definition, self.common))
        definition, ids = smaller(old.definition, used | {old.pad, network.config.pad_token_id, *old.specials})
        if len(ids) == token_table(network)[1].num_embeddings:
            first = f", is among the first {self.common}" if self.common else ""
            raise OptionError(
                f"every token occurs {self.least} times{first} or is needed for unknown text; nothing would go."
            )
        place = {i: new for new, i in enumerate(ids)}
        encoder = TextEncoder(definition, old.max_length, place.get(old.pad, 0))
        return replace(model, network=_with_rows(network, ids, place, encoder.pad), encoder=encoder)


@dataclass(frozen=True)
class FactorEmbedding:
    """The token table E (tokens, width) as A B with `rank` columns in A, least in squares weighted by how often tokens
    occur: the rows of B are the first right singular vectors of diag(share)^(1/2) E, and A = E B^T.

    At full rank nothing changes but rounding. Raises OptionError for a rank that the table does not have.
    """

    rank: int

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        new = model.with_network(copy.deepcopy(transformer(model, "FactorEmbedding")))
        network = transformer(new, "FactorEmbedding")
        name, table = token_table(network)
        rows, width = table.weight.shape
        if not 1 <= self.rank <= min(rows, width):
            raise OptionError(
                f"rank is {self.rank}; the table of {rows} tokens and width {width} has 1 to {min(rows, width)}."
            )
        counts = run.reduce(model, TokenCounts(model.encoder.vocabulary), unlabelled=True)["tokens"]
        # One more each: what training never shows is still approximated.
        share = torch.ones(rows, dtype=torch.float64)
        share[: len(counts)] += counts
        values = table.weight.detach().double()
        # They are the eigenvectors of a small matrix, ascending.
        _, vectors = torch.linalg.eigh(values.T @ (share[:, None] * values))
        directions = vectors.flip(1)[:, : self.rank]
        factored = FactoredEmbedding(rows, self.rank, width)
        with torch.no_grad():
            factored.table.weight.copy_(values @ directions)
            factored.project.weight.copy_(directions)
        network.replace(name, factored)
        return new


def token_table(network: Transformer) -> tuple[str, nn.Embedding]:
    """The token table and its name. Raises ModelError where it is no plain one."""
    table = cast(Any, network.backbone).get_input_embeddings()
    name = next((name for name, module in network.named_modules() if module is table), "")
    if not isinstance(table, nn.Embedding):
        raise ModelError(f"the token table is a {type(table).__name__} already; trim it before it is factored, once.")
    return name, table


def _with_rows(network: Transformer, ids: list[int], place: dict[int, int], pad: int) -> Transformer:
    """A copy whose table has only the rows `ids`, in that order, and whose config says so."""
    new = copy.deepcopy(network)
    name, table = token_table(new)
    config = new.config
    for key, value in list(vars(config).items()):
        if key == "pad_token_id" and value is not None:
            config.pad_token_id = place.get(value, pad)
        elif key.endswith("_token_id"):
            # Notes for generating text, which nothing here does; stale ones would name other tokens.
            setattr(config, key, place.get(value) if isinstance(value, int) else None)
    counted = network.backbone.get_submodule(name.removeprefix("backbone.").rpartition(".")[0])
    if hasattr(counted, "create_position_ids_from_input_ids") and config.pad_token_id != network.config.pad_token_id:
        raise ModelError(
            f"{config.model_type} counts positions from its padding token's id, {network.config.pad_token_id}, which "
            f"would become {config.pad_token_id}; its tokens cannot be trimmed."
        )
    padding = None if table.padding_idx is None else config.pad_token_id
    rows = nn.Embedding(len(ids), table.embedding_dim, padding_idx=padding)
    with torch.no_grad():
        rows.weight.copy_(table.weight[ids])
    config.vocab_size = len(ids)
    if name in new.edits:
        new.replace(name, rows)
    else:
        put(new, name, rows)
    return new


# --- tokenizers ---


def first_words(definition: str, common: int) -> list[int]:
    """The first `common` tokens but for those that no text gives: words that the tokenizer itself cuts apart."""
    tokenizer = Tokenizer.from_str(definition)
    cut, prefix = tokenizer.pre_tokenizer, getattr(tokenizer.model, "continuing_subword_prefix", "")
    if cut is None or not isinstance(tokenizer.model, (models.WordPiece, models.WordLevel)):
        return list(range(common))
    names = [(i, (tokenizer.id_to_token(i) or "").removeprefix(prefix)) for i in range(common)]
    return [i for i, name in names if len(cut.pre_tokenize_str(name)) == 1]


def smaller(definition: str, keep: set[int]) -> tuple[str, list[int]]:
    """A tokenizer.json with the tokens of these ids and those that it cannot do without, and each new token's old id.

    Added tokens, the unknown token, those that post-processing adds, and the pieces of last resort stay. New ids are in
    the order of the old ones.
    """
    stored = json.loads(definition)
    model, added = stored["model"], stored.get("added_tokens") or []
    if model.get("type") not in _KINDS:
        raise ModelError(f"a tokenizer of type {model.get('type')!r} cannot be trimmed; {', '.join(_KINDS)} can.")
    tokens = Tokenizer.from_str(definition).get_vocab(with_added_tokens=True)
    names = {i: token for token, i in tokens.items()}
    stay = {names[i] for i in keep if i in names} | {t["content"] for t in added}
    stay |= {token for token, _ in _specials(stored.get("post_processor"))}
    kind = {"BPE": _bpe, "Unigram": _unigram}.get(model["type"], _words)
    if kind is _words:
        stay |= _single(definition)
    left = kind(model, stay)
    own = sorted(left, key=tokens.__getitem__)
    # Added tokens that the model itself does not have come behind its own, in the order of the file.
    order = own + [t["content"] for t in added if t["content"] not in left]
    place = {token: i for i, token in enumerate(dict.fromkeys(order))}
    _renumber(stored, place)
    written = json.dumps(stored, ensure_ascii=False)
    if Tokenizer.from_str(written).get_vocab(with_added_tokens=True) != place:
        raise ModelError("the tokenizer numbers its added tokens in a way that Netweight cannot repeat.")
    return written, [tokens[token] for token in place]


def _single(definition: str) -> set[str]:
    """Single characters and continuations of one, from which WordPiece spells a word; but no continuation that no word
    has, as in BERT's Chinese vocabulary, whose tokenizer makes each Han character a word by itself."""
    tokenizer = Tokenizer.from_str(definition)
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
    if prefix is None:
        return set()
    normal, cut = tokenizer.normalizer, tokenizer.pre_tokenizer

    def inside(character: str) -> bool:
        # Behind a letter, or behind itself: some cut where letters, digits and signs, or two scripts, meet.
        for word in (f"a{character}", character * 2):
            shown = word if normal is None else normal.normalize_str(word)
            if cut is None or len(cut.pre_tokenize_str(shown)) == 1:
                return True
        return False

    found = set()
    for token in tokenizer.get_vocab():
        part = token.removeprefix(prefix)
        if len(token) == 1 or (len(part) == 1 and inside(part)):
            found.add(token)
    return found


def _words(model: dict[str, Any], stay: set[str]) -> set[str]:
    """WordPiece and WordLevel: cut the vocabulary; returns what is left of it."""
    vocab = model["vocab"]
    _known_unknown(model, model.get("unk_token"), vocab)
    stay = stay | {model["unk_token"]}
    model["vocab"] = {token: i for token, i in vocab.items() if token in stay}
    return set(model["vocab"])


def _bpe(model: dict[str, Any], stay: set[str]) -> set[str]:
    """BPE: cut the vocabulary and the merges.

    What no merge makes (bytes, characters) stays, and so do the tokens that a kept one is merged from, by any merge:
    then each merge that a text of kept tokens went through is there in the same order, and none is new.
    """
    prefix = len(model.get("continuing_subword_prefix") or "")
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made = [left + right[prefix:] for left, right in pairs]
    parts: dict[str, set[str]] = {}
    for pair, token in zip(pairs, made, strict=True):
        parts.setdefault(token, set()).update(pair)
    stay = (stay | {model.get("unk_token") or ""} | (model["vocab"].keys() - parts.keys())) & model["vocab"].keys()
    new = set(stay)
    while new:
        new = {part for token in new for part in parts.get(token, ())} - stay
        stay |= new
    kept = [i for i, (pair, token) in enumerate(zip(pairs, made, strict=True)) if stay.issuperset((*pair, token))]
    model["merges"] = [model["merges"][i] for i in kept]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if token in stay}
    return stay


def _unigram(model: dict[str, Any], stay: set[str]) -> set[str]:
    """Unigram: cut the list of tokens and scores.

    The token of the lowest score stays: an unknown character costs ten more than it.
    """
    vocab, unknown = model["vocab"], model.get("unk_id")
    _known_unknown(model, None if unknown is None else vocab[unknown][0], {token for token, _ in vocab})
    stay = stay | {vocab[unknown][0], min(vocab, key=lambda item: item[1])[0]}
    stay |= {token for token, _ in vocab if len(token.removeprefix("▁")) == 1 or token == "▁"}
    if model.get("byte_fallback"):
        stay |= {f"<0x{byte:02X}>" for byte in range(256)}
    model["vocab"] = [item for item in vocab if item[0] in stay]
    model["unk_id"] = next(i for i, (token, _) in enumerate(model["vocab"]) if token == vocab[unknown][0])
    return {token for token, _ in model["vocab"]}


def _known_unknown(model: dict[str, Any], token: str | None, vocab: Iterable[str]) -> None:
    if token is None or token not in vocab:
        raise ModelError(
            f"this {model['type']} tokenizer has no token for unknown text, so a text with a dropped word could not be "
            "encoded; it cannot be trimmed."
        )


def _specials(post: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """The tokens that post-processing adds, each with where its id stands."""
    if post is None:
        return []
    if post["type"] == "Sequence":
        return [found for part in post["processors"] for found in _specials(part)]
    if post["type"] in ("BertProcessing", "RobertaProcessing"):
        return [(post[name][0], post[name]) for name in ("cls", "sep")]
    if post["type"] == "TemplateProcessing":
        return [(token, held) for held in post["special_tokens"].values() for token in held["tokens"]]
    return []


def _renumber(stored: dict[str, Any], place: dict[str, int]) -> None:
    """Write new ids wherever a tokenizer definition has some, in place."""
    if isinstance(stored["model"]["vocab"], dict):
        stored["model"]["vocab"] = {token: place[token] for token in sorted(stored["model"]["vocab"], key=place.get)}  # type: ignore[arg-type]
    for token in stored.get("added_tokens") or []:
        token["id"] = place[token["content"]]
    for token, held in _specials(stored.get("post_processor")):
        if isinstance(held, list):
            held[1] = place[token]
        else:
            held["ids"] = [place[t] for t in held["tokens"]]
    if stored.get("padding"):
        stored["padding"]["pad_id"] = place.get(stored["padding"]["pad_token"], 0)
