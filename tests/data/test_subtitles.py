"""Cues of subtitles, labels, TextGrids and Whisper's JSON, with what such files have beside words; texts beside."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from higgstune.data.importers.subtitles import Cue, Cues, TextBeside, read_cues, text_beside
from higgstune.data.rejection import RowError
from higgstune.errors import DataError

RAW = Path(__file__).parents[3] / "shared" / "raw"
needs_raw = pytest.mark.skipif(not RAW.is_dir(), reason="the long recordings are not here")
quick = settings(deadline=None, max_examples=60, derandomize=True,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


def cues(folder: Path, name: str, content: str | bytes) -> Cues:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_cues(path)


def texts(found: Cues) -> list[str]:
    return [cue.text for cue in found]


def said(found: Cues) -> list[tuple[str | None, str]]:
    return [(cue.speaker, cue.text) for cue in found]


def srt(*blocks: str) -> str:
    """A second for each text, one after the other."""
    return "".join(
        f"{number + 1}\n00:00:{number:02d},000 --> 00:00:{number:02d},900\n{block}\n\n"
        for number, block in enumerate(blocks)
    )


def refusal(folder: Path, name: str, content: str | bytes) -> str:
    with pytest.raises(RowError) as error:
        cues(folder, name, content)
    assert error.value.reason in ("no_transcript", "bad_row")
    assert name in str(error.value)
    return str(error.value)


# Recordings with known truth


@needs_raw
@pytest.mark.parametrize(
    ("name", "off", "with_speakers"),
    [
        ("book.srt", 0.3, False),
        ("book.vtt", 0.3, True),
        ("book.labels.txt", 0.0, False),
        ("book.TextGrid", 0.0, True),
        ("interview.vtt", 0.3, True),
    ],
)
def test_the_cues_of_a_recording_are_those_it_was_made_with(name: str, off: float, with_speakers: bool) -> None:
    found = read_cues(RAW / name)
    truth = json.loads((RAW / f"{name.partition('.')[0]}.json").read_text())["utterances"]
    assert texts(found) == [utterance["text"] for utterance in truth]
    assert [cue.speaker for cue in found] == [utterance["speaker"] if with_speakers else None for utterance in truth]
    for cue, utterance in zip(found, truth, strict=True):
        assert abs(cue.start - utterance["start"]) <= off + 1e-9
        assert abs(cue.end - utterance["end"]) <= off + 1e-9
    assert not list(found.notes())


@needs_raw
def test_the_best_text_beside_a_recording() -> None:
    found = text_beside(RAW / "book.mp3")
    assert found.path == RAW / "book.TextGrid"
    assert found.has_times
    assert found.passed_over == (
        "book.json (has no segments with start, end and text)",
        *(f"{name} (book.TextGrid is used)" for name in ("book.labels.txt", "book.srt", "book.vtt")),
    )
    assert text_beside(RAW / "interview.opus").path == RAW / "interview.vtt"
    crowd = text_beside(RAW / "crowd.opus")
    assert crowd.path is None
    assert crowd.passed_over == ("crowd.json (has no segments with start, end and text)",)


# Subtitles


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_line_ends_and_encodings(tmp_path: Path, end: str, encoding: str) -> None:
    content = srt("We went\nhome.", "Élodie stayed.").replace("\n", end)
    found = cues(tmp_path, "a.srt", content.encode(encoding))
    assert found.read_as == "SubRip subtitles"
    assert list(found) == [Cue(0.0, 0.9, "We went home.", None), Cue(1.0, 1.9, "Élodie stayed.", None)]


@pytest.mark.parametrize(
    ("line", "start", "end"),
    [
        ("00:00:12,559 --> 00:00:13,895", 12.559, 13.895),
        ("00:00:12.559 --> 00:00:13.895", 12.559, 13.895),
        ("00:12.559 --> 00:13.895 align:start position:0%", 12.559, 13.895),
        ("100:00:00.000 --> 100:00:01.000", 360000.0, 360001.0),
        ("00:00:12,5-->00:00:13", 12.5, 13.0),
        ("0:00:01,000  -->  0:00:02,000  X1:100 X2:200 Y1:10 Y2:20", 1.0, 2.0),
    ],
)
def test_times_of_subtitles(tmp_path: Path, line: str, start: float, end: float) -> None:
    for head in ("", "1\n", "WEBVTT\n\n"):
        assert list(cues(tmp_path, "a.vtt", f"{head}{line}\nHello.\n")) == [Cue(start, end, "Hello.", None)]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("<i>Hello</i> <b>there</b>.", "Hello there."),
        ('<font color="#ff0000">Hello\nthere.</font>', "Hello there."),
        ("{\\an8}Hello{\\i1} there.", "Hello there."),
        ("Hello\\Nthere,\\hyou.", "Hello there, you."),
        ("<c.yellow.bg_blue>Hello</c> <lang en-GB>there</lang>.", "Hello there."),
        ("Hello<00:00:13.000><c> there</c>.", "Hello there."),
        ("<ruby>漢字<rt>かんじ</rt></ruby>です", "漢字です"),
        ("Tom &amp; Jerry&#39;s &lt;3&nbsp;AT&T", "Tom & Jerry's <3 AT&T"),
        ("I <3 you, a < b > c", "I <3 you, a < b > c"),
        ("- Hello.", "Hello."),
        ("–Hello.", "Hello."),
        (">> Hello.", "Hello."),
        ("&gt;&gt; Hello.", "Hello."),
        ("-5 degrees, \u2013 5 more", "-5 degrees, \u2013 5 more"),
        ("- 5 degrees", "- 5 degrees"),
        ("twenty-\nfour - or so", "twenty- four - or so"),
        ("我们\n回家。", "我们回家。"),
        ("우리는\n집에", "우리는 집에"),
        ("Hello.\n\nThere.", "Hello. There."),
        ("Hello.\n \nThere.", "Hello. There."),
        ("1984", "1984"),
        ("It is 10:30 - 11:30 now", "It is 10:30 - 11:30 now"),
        ("10:30 - 11:30", "10:30 - 11:30"),
        ("Hello.\ufeff", "Hello."),
    ],
)
def test_the_words_of_a_cue(tmp_path: Path, raw: str, text: str) -> None:
    assert texts(cues(tmp_path, "a.srt", srt("First.", raw, "Last."))) == ["First.", text, "Last."]


def test_what_is_not_said_is_kept_apart_and_counted(tmp_path: Path) -> None:
    blocks = ["[music]", "(applause)", "<i>[upbeat orchestral music continues to play]</i>", "♪ la la la ♪", "...",
              "- [LAUGHS]", "", "*sighs*", "(a door\ncloses)", "[door creaks]\nWho is there?",
              "I (he said) know."]  # fmt: skip
    found = cues(tmp_path, "a.srt", srt(*blocks))
    assert texts(found) == ["Who is there?", "I (he said) know."]
    assert found.cues[0].start == 9.0
    assert [cue.start for cue in found.not_speech] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 8.0, 9.0]
    assert found.not_speech[7].text == "(a door closes)"
    assert list(found.notes()) == [
        "cues that are not speech: 9 ([music], (applause), [upbeat orchestral music continues to play], ...)",
        "cues without a text: 1",
    ]


def test_a_note_shows_the_beginnings_of_few_texts(tmp_path: Path) -> None:
    found = cues(tmp_path, "a.srt", srt("[" + "x " * 100_000 + "]", "%a " * 10_000, "(b)", "(c)", "Hello."))
    assert texts(found) == ["Hello."]
    [note] = found.notes()
    assert note.startswith("cues that are not speech: 4 ([x x")
    assert note.endswith("%a, (b), ...)")
    assert len(note) < 150


def test_round_brackets_in_labels_may_be_spoken(tmp_path: Path) -> None:
    found = cues(tmp_path, "a.txt", "0.0\t1.0\t(as he said)\n1.0\t2.0\t(applause)\n")
    assert texts(found) == ["(as he said)"]
    assert [cue.text for cue in found.not_speech] == ["(applause)"]


def test_blocks_of_webvtt_that_are_not_cues(tmp_path: Path) -> None:
    content = """WEBVTT - a title
Kind: captions

NOTE made by hand
00:00.000 --> 00:01.000
commented out

STYLE
::cue(b) { color: red }

REGION
id:fred

first one
00:01.000 --> 00:02.000
NOTE is a word here.

NOTE

3
00:02.000 --> 00:03.000 line:0
<v.loud Anna Smith>We went home.</v>

00:03.000 --> 00:04.000
<v Tom &amp; Jerry>No.
"""
    assert list(cues(tmp_path, "a.vtt", content)) == [
        Cue(1.0, 2.0, "NOTE is a word here.", None),
        Cue(2.0, 3.0, "We went home.", "Anna Smith"),
        Cue(3.0, 4.0, "No.", "Tom & Jerry"),
    ]


def test_ids_of_cues_are_not_texts_and_texts_are_not_ids(tmp_path: Path) -> None:
    no_gaps = "1\n00:00 --> 00:01\nOne.\n2\n00:01 --> 00:02\n3\n00:02 --> 00:03\nThree.\n"
    found = cues(tmp_path, "a.srt", no_gaps)
    assert texts(found) == ["One.", "Three."]
    assert found.without_text == [Cue(1.0, 2.0, "", None)]
    without_ids = "00:00 --> 00:01\n1984\n\n00:01 --> 00:02\nOr\n7\n00:02 --> 00:03\nThree.\n"
    assert texts(cues(tmp_path, "a.srt", without_ids)) == ["1984", "Or 7", "Three."]
    wide = "1\n\n00:00 --> 00:01\n\nOne.\n\n\n2\n\n00:01 --> 00:02\n\nTwo.\n"
    assert texts(cues(tmp_path, "a.srt", wide)) == ["One.", "Two."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00:00:12,000 --> 00:00:11,000", "a.srt:6: 12 to 11 s is not a stretch"),
        ("-00:00:01,000 --> 00:00:02,000", "a.srt:6: .* is not a time such as"),
        ("00:00:75,000 --> 00:00:76,000", "a.srt:6: .* is not a time"),
        ("00:00:01,000 -> 00:00:02,000", "a.srt:6: .* is not a time"),
        ("00:00:0l,000 --> 00:00:02,000", "a.srt:6: .* is not a time"),
        ("00:00:01,000 -->", "a.srt:6: .* is not a time"),
        ("9999999:00:01 --> 9999999:00:02", "a.srt:6: .* is not a time"),
    ],
)
def test_a_wrong_time_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    content = f"1\n00:00:00,000 --> 00:00:01,000\nOne.\n\n2\n{line}\nTwo.\n"
    with pytest.raises(RowError, match=message):
        cues(tmp_path, "a.srt", content)


def test_cues_are_sorted_may_overlap_and_stand_once(tmp_path: Path) -> None:
    content = (
        "2\n00:00:05,000 --> 00:00:09,000\nLater.\n\n1\n00:00:00,000 --> 00:00:06,000\nSooner.\n\n"
        "3\n00:00:05,000 --> 00:00:09,000\nLater.\n\n4\n00:00:09,000 --> 00:00:09,000\nAt once.\n"
    )
    found = cues(tmp_path, "a.srt", content)
    assert list(found) == [Cue(0.0, 6.0, "Sooner.", None), Cue(5.0, 9.0, "Later.", None)]
    assert found.without_length == [Cue(9.0, 9.0, "At once.", None)]
    assert list(found.notes()) == ["cues without a length: 1 (At once.)"]


def test_captions_that_roll_have_each_line_once(tmp_path: Path) -> None:
    lines = ["hello and welcome", "to my channel", "to my channel", "today we cook"]
    content = "WEBVTT\nKind: captions\nLanguage: en\n\n"
    for number, line in enumerate(lines):  # as YouTube writes them
        above = lines[number - 1] if number else " "
        words = line.replace(" ", f"<00:00:{number:02d}.500><c> ", 1) + "</c>"
        content += f"00:00:{number:02d}.000 --> 00:00:{number:02d}.990 align:start position:0%\n{above}\n{words}\n\n"
        content += f"00:00:{number:02d}.990 --> 00:00:{number + 1:02d}.000 align:start position:0%\n{line}\n \n\n"
    found = cues(tmp_path, "a.vtt", content)
    assert [(cue.start, cue.text) for cue in found] == list(enumerate(lines))
    assert not list(found.notes())


def test_captions_that_grow_have_each_word_once(tmp_path: Path) -> None:
    found = cues(tmp_path, "a.srt", srt("hello", "hello and", "hello and welcome", "and welcome", "Bye."))
    assert texts(found) == ["hello", "and", "welcome", "Bye."]


def test_what_is_said_twice_stays(tmp_path: Path) -> None:
    blocks = ["No.", "No.", "No.", "No.\nNever.", "And so\nhe left.", "And so\nshe left."]
    expected = ["No.", "No.", "No.", "No. Never.", "And so he left.", "And so she left."]
    assert texts(cues(tmp_path, "a.srt", srt(*blocks))) == expected


# Speakers


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (["ANNA: Hi.", "Well.", "ANNA: Bye.", "MAN 2: Help!"],
         [("ANNA", "Hi."), (None, "Well."), ("ANNA", "Bye."), ("MAN 2", "Help!")]),
        (["Anna: Hi.", "Dr. Ben : Hello.", "- Anna: Bye.", "Dr. Ben : Yes."],
         [("Anna", "Hi."), ("Dr. Ben", "Hello."), ("Anna", "Bye."), ("Dr. Ben", "Yes.")]),
        (["[SPEAKER_00]: Hi.", "Speaker 2: Hello."], [("SPEAKER_00", "Hi."), ("Speaker 2", "Hello.")]),
        (["Remember: be there.", "He said: no.", "Remember: be on time.", "At 10: 30 came.", "So: go."],
         [(None, "Remember: be there."), (None, "He said: no."), (None, "Remember: be on time."),
          (None, "At 10: 30 came."), (None, "So: go.")]),
        (["WARNING: it is hot.", "Yes."], [(None, "WARNING: it is hot."), (None, "Yes.")]),
        (["REMEMBER: BE THERE.", "SO IT WAS.", "REMEMBER: BE ON TIME.", "YES.", "NO."],
         [(None, "REMEMBER: BE THERE."), (None, "SO IT WAS."), (None, "REMEMBER: BE ON TIME."), (None, "YES."),
          (None, "NO.")]),
        (["- Hi.\n- Hello.", "- Hi\nthere."], [(None, "Hi. Hello."), (None, "Hi there.")]),
        (["<v Anna>Hi.</v>\n<v Ben>Hello.</v>", "<v Anna>Bye."], [(None, "Hi. Hello."), ("Anna", "Bye.")]),
    ],
)  # fmt: skip
def test_a_speaker_is_named_only_where_that_is_plain(
    tmp_path: Path, blocks: list[str], expected: list[tuple[str | None, str]]
) -> None:
    found = cues(tmp_path, "a.srt", srt(*blocks))
    assert said(found) == expected
    mixed = sum(block.count("\n- ") + block.count("\n<v") for block in blocks)
    assert list(found.notes()) == (
        [f"cues in which several speak, whose speakers are not used: {mixed}"] if mixed else []
    )


# Audacity


def test_labels(tmp_path: Path) -> None:
    content = "2,5\t3,9\tThen\tleft.\r\n1.25\t3.9\tWe went home.\r\n\\\t90.0\t4000.0\r\n5.0\t5.0\tchapter\r\n"
    content += "6.0\t7.0\t\r\n7.0\t8.0\r\n"
    for name in ("a.txt", "a.labels.txt"):
        found = cues(tmp_path, name, content)
        assert list(found) == [Cue(1.25, 3.9, "We went home.", None), Cue(2.5, 3.9, "Then left.", None)]
        assert found.without_length == [Cue(5.0, 5.0, "chapter", None)]
        assert len(found.without_text) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0.0\t1.0\tOne.\nTwo.\n", ":2: 'Two.' is not start, end and text with tabs"),
        ("0.0\t1.0\tOne.\n\n3.0\t2.0\tTwo.\n", ":3: 3 to 2 s is not a stretch"),
        ("-1.0\t1.0\tOne.\n", ":1: -1 to 1 s is not a stretch"),
        (f"0.0\t{'9' * 400}\tOne.\n", ":1: 0 to inf s is not a stretch"),
        ("0.0 1.0 One.\n", ":1: '0.0 1.0 One.' is not start, end"),
        ("", " has no cue"),
    ],
)
def test_a_wrong_label_is_refused_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    assert message in refusal(tmp_path, "a.labels.txt", content)


# Praat

Tiers = dict[str, list[tuple[float, float, str]]]


def long_form(tiers: Tiers) -> str:
    text = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 9\ntiers? <exists>\n'
    text += f"size = {len(tiers)}\nitem []:\n"
    for number, (name, intervals) in enumerate(tiers.items(), 1):
        is_points = name.startswith("point")
        kind, what = ("TextTier", "points") if is_points else ("IntervalTier", "intervals")
        text += f'    item [{number}]:\n        class = "{kind}"\n        name = "{name}"\n'
        text += f"        xmin = 0\n        xmax = 9\n        {what}: size = {len(intervals)}\n"
        for place, (start, end, content) in enumerate(intervals, 1):
            quoted = content.replace('"', '""')
            times = f"number = {start}" if is_points else f"xmin = {start}\n            xmax = {end}"
            text += f'        {what} [{place}]:\n            {times}\n            text = "{quoted}"\n'
    return text


def short_form(tiers: Tiers) -> str:
    text = f'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n9\n<exists>\n{len(tiers)}\n'
    for name, intervals in tiers.items():
        is_points = name.startswith("point")
        text += f'"{"TextTier" if is_points else "IntervalTier"}"\n"{name}"\n0\n9\n{len(intervals)}\n'
        for start, end, content in intervals:
            quoted = content.replace('"', '""')
            text += (f"{start}\n" if is_points else f"{start}\n{end}\n") + f'"{quoted}"\n'
    return text


SENTENCES = [
    (0.0, 1.0, ""),
    (1.0, 3.0, 'She said "no".'),
    (3.0, 4.0, "sil"),
    (4.0, 6.0, "We went\nhome."),
    (6.0, 9.0, " "),
]
WORDS = [
    (1.0, 1.5, "she"),
    (1.5, 2.0, "said"),
    (2.0, 3.0, "no"),
    (4.0, 4.5, "we"),
    (4.5, 5.0, "went"),
    (5.0, 6.0, "home"),
]
PHONES = [(1.0, 1.2, "SH"), (1.2, 1.5, "IY1"), (1.5, 2.0, "S"), (4.0, 6.0, "W")]
TEXTS = ['She said "no".', "We went home."]


@pytest.mark.parametrize("form", [long_form, short_form])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    ("tiers", "expected", "notes"),
    [
        ({"utterances": SENTENCES}, [(None, t) for t in TEXTS], []),
        ({"Mary": SENTENCES}, [(None, t) for t in TEXTS], []),
        ({"phones": PHONES, "words": WORDS, "utterance": SENTENCES}, [(None, t) for t in TEXTS],
         ["tiers that are not used: phones, words"]),
        ({"Wort": WORDS, "Satz": SENTENCES[:2] + SENTENCES[3:]}, [(None, t) for t in TEXTS],
         ["tiers that are not used: Wort"]),
        ({"phones": PHONES, "words": WORDS[:2]}, [(None, "she"), (None, "said")], ["tiers that are not used: phones"]),
        ({"anna": SENTENCES[:2], "ben": SENTENCES[3:], "point": [(2.0, 2.0, "bell")]},
         [("anna", TEXTS[0]), ("ben", TEXTS[1])], ["tiers that are not used: point"]),
        ({"anna - words": WORDS[:1], "anna - phones": PHONES, "ben - words": WORDS[3:4]},
         [("anna", "she"), ("ben", "we")], ["tiers that are not used: anna - phones"]),
        ({"anna": [(1.0, 2.0, "Yes.")], "ben": [(3.0, 4.0, "Yes.")]}, [("anna", "Yes."), ("ben", "Yes.")], []),
        ({"text": SENTENCES, "speaker": [(0.0, 3.5, "anna"), (3.5, 4.2, "carl"), (4.2, 9.0, "ben")]},
         [("anna", TEXTS[0]), ("ben", TEXTS[1])], []),
        ({"silences": [(0.0, 1.0, "silent"), (1.0, 9.0, "sounding")], "Mary": SENTENCES}, [(None, t) for t in TEXTS],
         ["tiers that are not used: silences"]),
    ],
)  # fmt: skip
def test_the_tiers_of_a_textgrid(
    tmp_path: Path, form: object, encoding: str, tiers: Tiers, expected: list[tuple[str | None, str]], notes: list[str]
) -> None:
    assert callable(form)
    found = cues(tmp_path, "a.TextGrid", form(tiers).encode(encoding))
    assert said(found) == expected
    assert [note for note in found.notes() if "tiers" in note] == notes
    with_sil = any(text == "sil" for name in tiers for _, _, text in tiers[name] if name in found.read_as)
    assert [cue.text for cue in found.not_speech] == (["sil"] if with_sil else [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (long_form({"de": [(1.0, 2.0, "Ja.")], "en": [(1.0, 2.0, "Yes.")]}), "'de' and 'en' are about the same speech"),
        (long_form({"phones": PHONES}), "has no cue"),
        (long_form({"silences": [(0.0, 9.0, "silent")]}), "has no cue"),
        (long_form({"text": [(3.0, 2.0, "Yes.")]}), "a.TextGrid:16: 3 to 2 s is not a stretch"),
        (long_form({"text": SENTENCES}).rsplit("\n", 3)[0], ":33: it ends where a number should stand"),
        (short_form({"text": SENTENCES}).replace('"sil"', '"sil'), "a.TextGrid:"),
        (short_form({"text": SENTENCES}).replace("\n5\n", "\n5.5\n"), ":12: 5.5 stands where a number of tiers"),
        (short_form({"text": SENTENCES}).replace("\n5\n", "\n1e999\n"), ":12: inf stands where a number of tiers"),
        ('File type = "ooTextFile"\nObject class = "Pitch 1"\n', ":2: '\"Pitch 1\"' stands where \"TextGrid\" should"),
        ('"Praat chronological TextGrid text file"\n0 9\n', "save it as"),
        (b"ooBinaryFile\x08TextGrid\0\0\0\0", "NUL"),
    ],
)  # fmt: skip
def test_a_textgrid_that_cannot_be_read_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in refusal(tmp_path, "a.TextGrid", content)


# JSON


def test_segments_of_whisper(tmp_path: Path) -> None:
    segments = [
        {"id": 1, "start": 4.0, "end": 6, "text": " We went home.", "speaker": "SPEAKER_01", "words": []},
        {"id": 0, "start": 1.0, "end": 3.0, "text": ' She said "no".'},
        {"id": 2, "start": 6.0, "end": 7.0, "text": " [MUSIC]"},
        {"id": 3, "start": 7.0, "end": 8.0, "text": ""},
    ]
    found = cues(tmp_path, "a.json", json.dumps({"text": "...", "segments": segments, "language": "en"}))
    assert list(found) == [Cue(1.0, 3.0, TEXTS[0], None), Cue(4.0, 6.0, TEXTS[1], "SPEAKER_01")]
    assert [cue.text for cue in found.not_speech] == ["[MUSIC]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "Hello."}', "a.json has no segments with start, end and text"),
        ('{"segments": [{"text": "Hello.", "start": 1.0}]}', "has no segments with start, end and text"),
        ('{"segments": [{"text": "Hello.", "start": null, "end": 2}]}', "a time in a.json is None"),
        ('{"segments": [{"text": "Hello.", "start": NaN, "end": 2}]}', "a time in a.json is nan"),
        ('{"segments": [{"text": "Hello.", "start": 3, "end": 2}]}', "segment 'Hello.': 3 to 2 s is not a stretch"),
        ('{"segments": [', "a.json is not JSON"),
        ('{"a":' * 100_000, "a.json is not JSON"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    assert message in refusal(tmp_path, "a.json", content)


# Other files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Chapter one. It was late.", "a.txt holds text without times: save it as SubRip or WebVTT subtitles"),
        ("[Script Info]\n[Events]\nDialogue: 0,0:00:01.00,0:00:02.00,,,0,0,0,,Hi", "SubStation subtitles"),
        ("[00:01.00]la la", "lyrics"),
        ("", "holds no text"),
        ("Hello.\n\n00:00:01,000 --> 00:00:02,000\nHi.\n", "the text 'Hello.' stands before the first time"),
        ("WEBVTT\n\nHello.\n", "the text 'Hello.' stands before the first time"),
        ("WEBVTT\n\nNOTE nothing\n", "has no cue"),
        (srt("Caf\xe9").encode("latin-1"), "is not UTF-8 or UTF-16 (invalid continuation byte in line 3): convert it"),
    ],
)
def test_a_file_without_cues_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    assert message in refusal(tmp_path, "a.txt", content)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="there is no file"):
        read_cues(tmp_path / "a.srt")
    with pytest.raises(OSError, match="No such file"):
        text_beside(tmp_path / "b" / "a.wav")


WORD = st.text(st.characters(categories=["Ll"], max_codepoint=0x17F), min_size=1, max_size=8)


@quick
@given(st.lists(st.lists(WORD, min_size=1, max_size=4, unique=True), min_size=1, max_size=8), st.data())
def test_no_text_is_lost_or_doubled(tmp_path: Path, sentences: list[list[str]], data: st.DataObject) -> None:
    """Every word of a file comes out once, in its order, in any format."""
    sentences = [[f"{word}q{number}" for word in words] for number, words in enumerate(sentences)]  # none is a mark
    rows = [(float(n), n + 0.9, " ".join(words)) for n, words in enumerate(sentences)]
    gap = data.draw(st.sampled_from(["\n", " ", "\n\n", " <i>", "<00:00:01.000> "]))
    stamps = [(f"00:00:{int(a):02d}.000", f"00:00:{int(a):02d}.900") for a, _, _ in rows]
    bodies = [text.replace(" ", gap) for _, _, text in rows]
    order = data.draw(st.permutations(range(len(rows))))
    ids = data.draw(st.sampled_from(["", "{}\n", "cue {}\n"]))
    blocks = [f"{stamps[n][0]} --> {stamps[n][1]}\n{bodies[n]}\n\n" for n in order]
    vtt = "WEBVTT\n\n" + "".join(ids.format(n + 1) + block for n, block in enumerate(blocks))
    sub = "".join(f"{n + 1}\n{block.replace('.900', ',900')}" for n, block in enumerate(blocks))
    files: dict[str, str] = {
        "a.vtt": vtt,
        "a.srt": sub,
        "a.labels.txt": "".join("{}\t{}\t{}\n".format(*rows[n]) for n in order),
        "a.TextGrid": data.draw(st.sampled_from([long_form, short_form]))({"utterances": rows}),
        "a.json": json.dumps({"segments": [dict(zip(("start", "end", "text"), rows[n], strict=True)) for n in order]}),
    }
    for name, content in files.items():
        found = cues(tmp_path, name, content)
        assert [(cue.start, cue.end, cue.text) for cue in found] == rows, name
        assert not list(found.notes()), name


@quick
@given(st.integers(1, 3), st.lists(WORD, min_size=5, max_size=30, unique=True))
def test_rolling_captions_lose_and_double_nothing(tmp_path: Path, height: int, words: list[str]) -> None:
    """Any window of lines that moves by one line shows every line once."""
    lines = [f"{word} q{number}" for number, word in enumerate(words)]
    windows = [lines[max(0, n - height) : n + 1] for n in range(len(lines))]
    found = cues(tmp_path, "a.srt", srt(*("\n".join(window) for window in windows)))
    assert texts(found) == lines


@quick
@given(
    st.sampled_from(["WEBVTT\n\n", srt("Hi."), "0.0\t1.0\tHi.\n", long_form({"text": SENTENCES}), '{"segments": [']),
    st.lists(st.sampled_from(["\n", "\n\n", " --> ", "00:01.000", '"', '""', "<", ">", "[", "NOTE", "\\", "7", "1e999",
                              "\t", "-", "{", "}", "Anna: ", "\ufeff", "\0", "\ud800", "item [1]:", "<exists>"]),
             max_size=20),
    st.integers(0, 400),
)  # fmt: skip
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, content: str, added: list[str], cut: int) -> None:
    data = (content[:cut] + "".join(added) + content[cut:]).encode(errors="surrogatepass")
    try:
        found = cues(tmp_path, "a.srt", data)
    except DataError as error:
        message = str(error)
    else:
        assert all(0 <= cue.start < cue.end and cue.text for cue in found)
        return
    assert "a.srt" in message


# Texts beside a recording


def beside(folder: Path, *names: str, language: str | None = None) -> TextBeside:
    whisper = json.dumps({"segments": [{"start": 0.0, "end": 1.0, "text": "Hi."}]})
    for name in names:
        (folder / name).write_text(whisper if name.endswith(".json") else "It was late.", encoding="utf-8")
    return text_beside(folder / "book.mp3", language=language)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ("book.TextGrid book.labels.txt book.json book.vtt", "book.TextGrid"),
        ("book.json book.vtt book.labels.txt", "book.labels.txt"),
        ("book.srt book.json book.txt", "book.json"),
        ("book.srt book.vtt book.txt", "book.vtt"),
        ("book.txt book.SRT", "book.SRT"),
        ("book.lab book.txt book.normalized.txt", "book.normalized.txt"),
        ("book.mp3.srt", "book.mp3.srt"),
        ("book.en.srt", "book.en.srt"),
        ("book.pt-BR.vtt book.srt", "book.srt"),
        ("book.en-orig.vtt book.sdh.vtt book.txt", "book.sdh.vtt"),
        ("book.hi.srt", "book.hi.srt"),
        ("book.en.txt", "book.en.txt"),
        ("book2.srt book-2.srt book.part2.srt other.TextGrid book.srt.bak book", None),
        ("book.two.wav book.two.srt book.wav.srt", None),
        ("Book.srt", None),
    ],
)
def test_the_text_beside_a_recording(tmp_path: Path, names: str, chosen: str | None) -> None:
    found = beside(tmp_path, *names.split())
    assert (found.path and found.path.name) == chosen
    if chosen:
        others = sorted(set(names.split()) - {chosen})
        assert found.passed_over == tuple(f"{name} ({chosen} is used)" for name in others)
        assert found.has_times == (not chosen.endswith((".txt", ".lab")) or "labels" in chosen)


def test_the_content_decides_what_a_txt_is(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("0.0\t1.0\tHi.\n")
    (tmp_path / "book.lab").write_text("0 3000000 sil\n3000000 5000000 hh\n")
    (tmp_path / "book.original.txt").write_text("...")
    (tmp_path / "book.ass").write_text("[Script Info]")
    (tmp_path / "book.normalized.txt").write_bytes("caf\xe9".encode("latin-1"))
    found = beside(tmp_path, "book.srt")
    assert found.path == tmp_path / "book.txt"
    assert found.has_times
    assert found.passed_over == (
        "book.ass (.ass is not read: save it as .srt)",
        "book.lab (it holds HTK labels)",
        "book.normalized.txt (is not UTF-8 or UTF-16 (unexpected end of data in line 1): convert it)",
        "book.original.txt (it has no words)",
        "book.srt (book.txt is used)",
    )


def test_a_language_decides_between_subtitles(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"book\.de\.srt and book\.en\.srt lie beside book\.mp3: give the language"):
        beside(tmp_path, "book.en.srt", "book.de.srt")
    found = beside(tmp_path, language="en-GB")
    assert found.path == tmp_path / "book.en.srt"
    assert found.passed_over == ("book.de.srt (its language is de)",)
    assert beside(tmp_path, language="fr").path is None
    assert beside(tmp_path, "book.eng.srt", language="eng").path == tmp_path / "book.eng.srt"


def test_a_name_in_another_unicode_form_is_found(tmp_path: Path) -> None:
    (tmp_path / unicodedata.normalize("NFD", "été.de.srt")).write_text(srt("Hallo."))
    found = text_beside(tmp_path / unicodedata.normalize("NFC", "été.wav"))
    assert found.path is not None
    assert texts(read_cues(found.path)) == ["Hallo."]
