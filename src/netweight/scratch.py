"""Models from nothing but a shop's own texts: a tokenizer and token vectors made of them, and random layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel

from netweight.encode import TextEncoder, Tokens, listed
from netweight.errors import DataError, OptionError
from netweight.model import Base, Model
from netweight.network import Transformer, causal
from netweight.task import Task

Family = Literal["bert", "roberta", "xlm-roberta", "distilbert", "modernbert", "gpt2", "qwen3"]

SCRATCH = "scratch"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD, _CLS, _SEP = 0, 2, 3
_END = "<|endoftext|>"
_LONGEST_WORD = 300  # characters; the work of cutting one up grows with their square
_LEAST = 260  # the 256 bytes, and what stands for no text
# Neighbours at each side that count, and the power that keeps rare contexts from looking telling (Levy et al., 2015).
_WINDOW = 4
_SMOOTHED = 0.75


def scratch(  # noqa: PLR0913  (the sizes of a model are one noun, but a call names them one by one)
    texts: Iterable[str],
    task: Task,
    *,
    family: Family = "bert",
    vocabulary: int = 8000,
    layers: int = 4,
    hidden: int = 256,
    heads: int = 4,
    max_length: int = 128,
    seed: int = 0,
) -> Model:
    """A backbone with random layers and a zero head for `task`, and a tokenizer and token vectors that know the texts.

    Encoders get WordPiece under BERT's rules, which take Chinese apart into characters, but leave accents and vowel
    signs; GPT-2 and Qwen3 get byte-level BPE with an end token behind every text. Tokens start from what stands beside
    them (`token_vectors`), which takes seconds; the layers know nothing yet: see `techniques.Pretrain`. Attention has
    no dropout, which would keep processors from their fused kernel. The same texts and seed give the same model.

    Args:
        texts: what the tokenizer is trained on; texts in the same order.
        vocabulary: tokens at most.
        layers, hidden, heads: of the backbone; feed-forward layers have four times `hidden`, gated ones twice.
        max_length: tokens kept per row.

    Raises:
        OptionError: an unknown family, sizes that do not go together, or texts that are no strings.
        DataError: there is no text.
    """
    if family not in get_args(Family):
        raise OptionError(f"family {family!r} cannot be made from scratch; use {', '.join(get_args(Family))}.")
    if min(layers, hidden, heads) < 1 or hidden % (2 * heads):
        raise OptionError(
            f"{layers} layers of width {hidden} with {heads} heads do not go together; use at least one layer, and a "
            "width that is an even multiple of the heads."
        )
    if vocabulary < _LEAST:
        raise OptionError(f"a vocabulary of {vocabulary} is too small; use {_LEAST} tokens or more.")
    texts = listed(texts, "texts")
    if not any(text.strip() for text in texts):
        raise DataError("a tokenizer cannot be trained without texts; all of them are empty.")
    config = AutoConfig.for_model(family, **_sizes(family, layers, hidden, heads, max_length))
    tokenizer = byte_pairs(texts, vocabulary) if causal(config) else word_pieces(texts, vocabulary)
    encoder = TextEncoder(tokenizer.to_str(), max_length)
    config.vocab_size = encoder.vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = AutoModel.from_config(config, trust_remote_code=False)
        network = Transformer(backbone, task.outputs, "last" if causal(config) else "mean")
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(network.head.bias)
    table = network.backbone.get_input_embeddings().weight.data  # type: ignore[operator]
    vectors = token_vectors(encoder.encode(texts), encoder.vocabulary, encoder.specials, hidden)
    known = np.flatnonzero(vectors.any(axis=1))
    if len(known):
        # As large as the random ones, which stay where a token has no neighbours.
        found = torch.from_numpy(vectors[known] * (float(table.std()) / vectors[known].std()))
        table[torch.from_numpy(known), : found.shape[1]] = found
    return Model(network.eval(), encoder, task, Base(SCRATCH, "none: made from the rows alone"))


def token_vectors(tokens: Tokens, vocabulary: int, specials: Sequence[int], width: int) -> NDArray[np.float32]:
    """Vectors (vocabulary, width or less) of tokens by what stands near them; zeros where nothing does.

    The matrix of positive pointwise mutual information of token and context, factorised by SVD, which is what word2vec
    does implicitly (Levy & Goldberg, NIPS 2014): U sqrt(S), with weights 1/distance and smoothed contexts (Levy,
    Goldberg & Dagan, TACL 2015). `specials` have no neighbours and are nobody's.
    """
    # Both take a while to import, and hardly any job starts from nothing.
    from scipy.sparse import coo_array, csr_array
    from sklearn.utils.extmath import randomized_svd

    row = np.repeat(np.arange(len(tokens)), tokens.lengths)
    real = ~np.isin(tokens.ids, specials)
    counts = csr_array((vocabulary, vocabulary), dtype=np.float64)
    for distance in range(1, _WINDOW + 1):
        pairs = (row[distance:] == row[:-distance]) & real[distance:] & real[:-distance]
        left, right = tokens.ids[:-distance][pairs], tokens.ids[distance:][pairs]
        counts += coo_array((np.full(len(left), 1 / distance), (left, right)), counts.shape).tocsr()
    both = coo_array(counts + counts.T)
    often = both.sum(axis=1)
    context = often**_SMOOTHED
    information = np.log(both.data * context.sum() / (often[both.row] * context[both.col]))
    above = information > 0
    if not above.any():
        return np.zeros((vocabulary, 1), np.float32)
    matrix = csr_array((information[above], (both.row[above], both.col[above])), both.shape)
    u, s, _ = randomized_svd(matrix, min(width, vocabulary), random_state=0)
    vectors = u * np.sqrt(s)
    vectors[often > 0] -= vectors[often > 0].mean(axis=0)
    vectors[often == 0] = 0
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _sizes(family: Family, layers: int, hidden: int, heads: int, max_length: int) -> dict[str, Any]:
    """What each family calls them. Ids are those of the tokenizers below."""
    if family == "gpt2":
        sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_inner": 4 * hidden, "n_positions": max_length}
        return {**sizes, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "distilbert":
        sizes = {"n_layers": layers, "dim": hidden, "n_heads": heads, "hidden_dim": 4 * hidden}
        return {**sizes, "attention_dropout": 0.0, "max_position_embeddings": max_length, "pad_token_id": _PAD}
    usual: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": (2 if family in ("modernbert", "qwen3") else 4) * hidden,
        # RoBERTa numbers its tokens from behind the padding id.
        "max_position_embeddings": max_length + (_PAD + 1 if family in ("roberta", "xlm-roberta") else 0),
        "pad_token_id": _PAD,
    }
    if family == "qwen3":
        ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
        return {**usual, **ends, "num_key_value_heads": heads, "head_dim": hidden // heads}
    usual |= {"bos_token_id": _CLS, "eos_token_id": _SEP}
    if family == "modernbert":
        return {**usual, "cls_token_id": _CLS, "sep_token_id": _SEP}
    return {**usual, "attention_probs_dropout_prob": 0.0}


def word_pieces(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """WordPiece over BERT's normaliser and pre-tokeniser (Devlin et al., 2019), with [CLS] and [SEP] around texts."""
    # Where BERT drops what stands on letters, kana lose their sound, Thai and Devanagari their vowels.
    normalizer, splitter = normalizers.BertNormalizer(strip_accents=False), pre_tokenizers.BertPreTokenizer()
    alphabet, seen = _characters(texts, normalizer, splitter, vocabulary - len(_SPECIAL))
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = normalizer, splitter
    # The trainer numbers pieces such as ##a in the order of a hash table, which differs from run to run, and breaks
    # ties between merges by these numbers. Named as special tokens they have fixed ones.
    fixed = [*_SPECIAL, *alphabet, *seen]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=fixed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    # Thai, Lao and kana have no spaces: a clause is one word here, and BERT's 100 characters would make it one [UNK].
    made = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    made.normalizer, made.pre_tokenizer = normalizer, splitter
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(list(_SPECIAL))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", _CLS), ("[SEP]", _SEP)],
    )
    return made


def _characters(texts: Sequence[str], normalizer: Any, splitter: Any, room: int) -> tuple[list[str], list[str]]:
    """The most frequent characters, sorted, and those of them that stand inside words, as ##a: at most `room`."""
    counts: Counter[str] = Counter()
    inside: set[str] = set()
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            counts.update(word)
            inside.update(word[1:])
    kept, taken = [], 0
    for character in sorted(counts, key=lambda c: (-counts[c], c)):
        taken += 1 + (character in inside)
        if taken > room:
            break
        kept.append(character)
    return sorted(kept), [f"##{character}" for character in sorted(kept) if character in inside]


def byte_pairs(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE (Radford et al., GPT-2, 2019), with an end token behind every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {_END}", pair=f"$A {_END} $B:1 {_END}:1", special_tokens=[(_END, 0)]
    )
    return made
