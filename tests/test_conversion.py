"""Tokenizers that lie in older files alone: the tokenizer.json made of them gives the tokens that the files say."""

import io
import json

import pytest
import sentencepiece
from transformers import AutoTokenizer

from resources.checkpoints.conversion import require_right_conversion, take_normalizer
from resources.errors import CheckpointError
from resources.tasks.samples import sample_texts

TEXTS = [text for text in sample_texts() if text]


def sentence_pieces(path, *first):
    """Train a unigram model with SentencePiece's usual rules. first: the pieces that come first."""
    names = {name: number for number, name in enumerate(("pad", "bos", "eos", "unk")) if first}
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=made,
        vocab_size=700,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        **{f"{name}_id": number for name, number in names.items()},
        **{f"{name}_piece": piece for name, piece in zip(names, first, strict=True)},
    )
    path.write_bytes(made.getvalue())


def opened(folder, kind, model_type):
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(folder)


def test_sentence_pieces_are_converted_as_they_are(tmp_path):
    sentence_pieces(tmp_path / "sentencepiece.bpe.model")
    require_right_conversion(tmp_path, opened(tmp_path, "XLMRobertaTokenizer", "xlm-roberta"))


def test_the_rules_of_the_model_are_taken_where_transformers_has_its_own(tmp_path):
    sentence_pieces(tmp_path / "spm.model", "[PAD]", "[CLS]", "[SEP]", "[UNK]")
    made = opened(tmp_path, "DebertaV2Tokenizer", "deberta-v2")
    with pytest.raises(
        CheckpointError, match="gives other tokens than those files do for .* texts. For the first one, "
    ):
        require_right_conversion(tmp_path, made)
    assert take_normalizer(tmp_path, made)
    require_right_conversion(tmp_path, made)


def test_pieces_of_another_model_are_refused(tmp_path):
    sentence_pieces(tmp_path / "sentencepiece.bpe.model")
    made = opened(tmp_path, "XLMRobertaTokenizer", "xlm-roberta")
    state = json.loads(made.backend_tokenizer.to_str())
    state["model"]["vocab"] = [
        [piece, score * (-1 if len(piece) == 3 else 1)] for piece, score in state["model"]["vocab"]
    ]
    made._tokenizer = type(made.backend_tokenizer).from_str(json.dumps(state))
    with pytest.raises(CheckpointError, match="a tokenizer.json that its author made"):
        require_right_conversion(tmp_path, made)
    assert take_normalizer(tmp_path, made)
    with pytest.raises(CheckpointError, match="gives other tokens"):
        require_right_conversion(tmp_path, made)


def byte_pairs(folder):
    from tokenizers import ByteLevelBPETokenizer

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=600, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    made.save_model(str(folder))


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_byte_pairs_are_merged_in_the_order_of_their_file(tmp_path, ends):
    byte_pairs(tmp_path)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", ends.encode()))
    made = opened(tmp_path, "RobertaTokenizer", "roberta")
    require_right_conversion(tmp_path, made)
    lines = merges.read_text().splitlines()
    merges.write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    with pytest.raises(CheckpointError, match="gives other tokens"):
        require_right_conversion(tmp_path, made)


def word_pieces(folder):
    from tokenizers import BertWordPieceTokenizer

    made = BertWordPieceTokenizer()
    made.train_from_iterator(TEXTS, vocab_size=600, show_progress=False)
    made.save_model(str(folder))


def test_word_pieces_are_those_of_the_first_bert(tmp_path):
    word_pieces(tmp_path)
    made = opened(tmp_path, "BertTokenizer", "bert")
    require_right_conversion(tmp_path, made)
    words = (tmp_path / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join(word for word in words if word != "##s" and word != "##e") + "\n")
    with pytest.raises(CheckpointError, match="gives other tokens"):
        require_right_conversion(tmp_path, made)
