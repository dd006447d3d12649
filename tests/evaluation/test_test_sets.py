"""Test sets: the built-in sentences, files of sentences, and Seed-TTS-eval's format."""

import re
from pathlib import Path

import pytest
from recordings import speech, write

from higgstune.data.rules import TAGS
from higgstune.data.text import clean_text, find_control_tokens
from higgstune.errors import ConfigError, DataError
from higgstune.evaluation.test_sets import LANGUAGES, Sentence, read_sentences
from higgstune.generate.chunks import MAX_CHUNK_SECONDS, expected_seconds, split_text

SCRIPTS = {
    "ar": r"[\u0600-\u06ff0-9\s.,:%\"!]+",
    "de": r"[A-Za-zÄÖÜäöüß0-9\s.,:;?!„“%]+",
    "en": r"[A-Za-z0-9\s.,:;?!'\"$%-]+",
    "es": r"[A-Za-zÁÉÍÓÚÑáéíóúñü0-9\s.,:;?!¿¡“”%]+",
    "vi": r"[A-Za-zÀ-ỹ0-9\s.,:;?!“”%-]+",
    "zh": r"[\u4e00-\u9fff0-9，。、：；？！“”《》.%-]+",
}
LONG = {language: (35, 60) if language == "zh" else (20, 35) for language in LANGUAGES}


def size(text: str, language: str) -> int:
    """Words; of Mandarin, characters without punctuation."""
    return sum(map(str.isalnum, text)) if language == "zh" else len(text.split())


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_built_in_set_has_100_sentences_with_numbers_and_long_ones(language: str) -> None:
    sentences = read_sentences(language)
    texts = [sentence.text for sentence in sentences]
    assert len(texts) == len(set(texts)) == 100
    assert [sentence.id for sentence in sentences[::99]] == [f"{language}-001", f"{language}-100"]
    assert {sentence.language for sentence in sentences} == {language}
    with_numbers = [text for text in texts if re.search(r"\d", text)]
    shortest, longest = LONG[language]
    sizes = [size(text, language) for text in texts]
    assert 33 <= len(with_numbers) <= 45
    assert 33 <= sum(shortest <= words <= longest for words in sizes) <= 45
    assert max(sizes) <= longest
    assert sum("?" in text or "？" in text or "؟" in text for text in texts) >= 8
    assert sum("!" in text or "！" in text for text in texts) >= 6
    assert any(mark in text for text in texts for mark in '"“„')


@pytest.mark.parametrize("language", LANGUAGES)
def test_built_in_sentences_are_well_written_and_never_split(language: str) -> None:
    for text in (sentence.text for sentence in read_sentences(language)):
        assert re.fullmatch(SCRIPTS[language], text), text
        assert " ".join(text.split()) == text, "white space"
        assert text.endswith(tuple('.?!。？！؟"”“')), text
        assert expected_seconds(text) <= MAX_CHUNK_SECONDS, text
        assert split_text(clean_text(text)) == [clean_text(text)], text


def test_each_tag_has_a_sentence_with_the_tag_where_it_belongs() -> None:
    sentences = read_sentences("tags")
    assert [find_control_tokens(sentence.text) for sentence in sentences] == [[tag] for tag in TAGS]
    assert {sentence.language for sentence in sentences} == {"en"}
    for text in (sentence.text for sentence in sentences):
        [tag] = find_control_tokens(text)
        before, after = text.split(tag)
        if "pause" in tag:
            assert before, text
            assert after.startswith(" "), text
        elif "sfx" in tag:
            assert re.match(r"\w+,? ", after), text  # the sound, as a word
        else:
            assert not before, text


def test_built_in_sets_come_in_the_given_order() -> None:
    sentences = read_sentences("zh, en")
    assert [sentence.language for sentence in sentences] == ["zh"] * 100 + ["en"] * 100
    assert len({sentence.id for sentence in sentences}) == 200
    with pytest.raises(ConfigError, match=r"'eng'.*did you mean 'en'"):
        read_sentences("eng")
    with pytest.raises(ConfigError, match="no test set ''"):
        read_sentences("en,")
    with pytest.raises(ConfigError, match="one of them twice"):
        read_sentences("en,de,en")


def test_a_file_has_a_sentence_a_line(tmp_path: Path) -> None:
    file = tmp_path / "texts.TXT"
    file.write_bytes("\ufeffFirst one.\r\n\r\n  Zweiter\u2028Satz. \r\n".encode())
    assert read_sentences(str(file)) == [
        Sentence("0001", "First one.", None),
        Sentence("0002", "Zweiter\u2028Satz.", None),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no sentence"),
        (b" \n\t\n", "has no sentence"),
        (b"One.\nTwo.\n\xff\xfe\n", "line 3 is not UTF-8"),
        (b"One.\n\n?!\n", r"line 3: the text '\?!' has nothing to say"),
        (b"One.\nStop <|eot_id|> here.\n", r"line 2: the text has <\|eot_id\|>"),
    ],
)
def test_a_wrong_file_is_an_error_with_its_line(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_sentences(str(file))


def test_missing_files_and_files_of_another_kind_are_errors(tmp_path: Path) -> None:
    for name in ("texts.txt", "meta.lst"):
        with pytest.raises(DataError, match=f"{name} cannot be read: No such file"):
            read_sentences(str(tmp_path / name))
    (tmp_path / "texts.csv").write_text("One.")
    with pytest.raises(ConfigError, match=r"neither a \.txt nor a \.lst file"):
        read_sentences(str(tmp_path / "texts.csv"))


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """`zh/meta.lst`, to be written, beside its audio."""
    folder = tmp_path / "zh"
    write(folder / "prompt-wavs" / "p1.wav", speech(0.1))
    write(folder / "wavs" / "w1.wav", speech(0.1))
    (folder / "wavs" / "text.wav").write_text("no sound")
    write(tmp_path / "outside.wav", speech(0.1))
    (folder / "link.wav").symlink_to(tmp_path / "outside.wav")
    return folder / "meta.lst"


def test_seed_tts_eval_is_read_with_references_and_recordings(meta: Path) -> None:
    meta.write_text(
        "10002287-00000094|在此奉劝大家。|prompt-wavs/p1.wav|打远一看。\n"
        "10002287-00000095|在此奉劝大家。|prompt-wavs/p1.wav|它们走了。|wavs/w1.wav\n",
        encoding="utf-8",
    )
    first, second = read_sentences(str(meta))
    assert first == Sentence(
        "10002287-00000094", "打远一看。", "zh",
        reference=meta.parent / "prompt-wavs" / "p1.wav", reference_text="在此奉劝大家。",
    )  # fmt: skip
    assert second.recording == meta.parent / "wavs" / "w1.wav"
    other = meta.parent.rename(meta.parent.with_name("mine"))
    assert {sentence.language for sentence in read_sentences(str(other / "meta.lst"))} == {None}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("b|hello|prompt-wavs/p1.wav", r"line 2: 3 fields, where id\|prompt text"),
        ("b|hello|prompt-wavs/p1.wav|x|wavs/w1.wav|z", "line 2: 6 fields"),
        ("b|hello|prompt-wavs/p2.wav|x", r"line 2: .*p2\.wav is missing"),
        ("b|hello|prompt-wavs|x", "line 2: .*prompt-wavs is missing"),
        ("b|hello|prompt-wavs/p1.wav|x|wavs/none.wav", r"line 2: .*none\.wav is missing"),
        ("b|hello|prompt-wavs/p1.wav|x|wavs/text.wav", r"line 2: .*text\.wav.*cannot be read"),
        ("b|hello|../outside.wav|x", r"line 2: '\.\./outside\.wav' leads out of the folder"),
        ("b|hello|link.wav|x", r"line 2: 'link\.wav' leads out of the folder"),
        ("b|hello|/etc/hostname|x", "line 2: '/etc/hostname' leads out of the folder"),
        ("b|hello|a\0b.wav|x", "line 2: .* cannot be a path"),
        ("a|hello|prompt-wavs/p1.wav|x", "line 2: the id a is used at .*line 1 too"),
        ("b|hello|prompt-wavs/p1.wav| ", "line 2: the text '' has nothing to say"),
        ("b|...|prompt-wavs/p1.wav|x", r"line 2: the prompt text '\.\.\.' has nothing to say"),
        ("|hello|prompt-wavs/p1.wav|x", "line 2: the id '' cannot name a file"),
        ("../b|hello|prompt-wavs/p1.wav|x", r"line 2: the id '\.\./b' cannot name a file"),
        ("b" * 201 + "|hello|prompt-wavs/p1.wav|x", "line 2: the id 'bbb.*cannot name a file"),
    ],
)
def test_a_wrong_row_is_an_error_with_its_line(meta: Path, line: str, said: str) -> None:
    meta.write_text(f"a|hello|prompt-wavs/p1.wav|One.\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_sentences(str(meta))
