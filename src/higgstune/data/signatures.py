"""What a file is by its first bytes, whatever its name says: audio that is read, or what is found in its place."""

import re
import shlex
from pathlib import Path

from higgstune.checkpoint_files import LFS_POINTER

HEAD = 512  # bytes that show what a file is
_FORMATS = "wav, flac, mp3, ogg, opus, m4a, mp4, mov, webm, mkv or aac"
# libsndfile reads forty formats; it gets only these. An MPEG frame whose layer is 0 is AAC.
_READ = re.compile(rb"RIFF|RIFX|RF64|fLaC|OggS|ID3|\xff[\xe2-\xe7\xea-\xef\xf2-\xf7\xfa-\xff]")
# PyAV reads hundreds; it gets only these, under libavformat's name of each.
_CONTAINERS = (
    (re.compile(rb".{4}ftyp", re.DOTALL), "mov"),
    (re.compile(rb"\x1a\x45\xdf\xa3"), "matroska"),  # WebM, too
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), "aac"),  # with ADTS headers
)
_FETCH = "the recording itself was not fetched: run `git lfs pull` where the folder was cloned"
_DOWNLOAD = "a server sent it in place of the recording: download that again"
_CONVERT = "convert"  # stands for `conversion`
_LISTED = "name those, or, if you trust all that it names, convert"
_REPLACE = "put the recording in its place"
_OTHERS = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what, advice)
    for pattern, what, advice in (
        (LFS_POINTER, "a pointer of Git LFS", _FETCH),
        (rb"(\.\./)*(\.git)?/annex/objects/", "a pointer of git-annex", "fetch the recording with `git annex get`"),
        (rb"(\xef\xbb\xbf)?\s*(<!--.*)?<(!doctype html|html|head|body)\b", "a web page", _DOWNLOAD),
        (rb"(\xef\xbb\xbf)?\s*<(\?xml|error)\b", "an XML file", _DOWNLOAD),
        (rb"(\xef\xbb\xbf)?\s*(\{\s*[\"}]|\[\s*[{\"\]])", "a JSON file", _DOWNLOAD),
        (rb"(\xef\xbb\xbf)?\s*(ffconcat version|#EXTM3U|\[playlist\])", "a list of other files", _LISTED),
        (rb".{4}(moov|mdat|wide)", "a QuickTime film of the old kind", _CONVERT),
        (rb"RIFF.{4}AVI ", "an AVI video", _CONVERT),
        (rb"OggS.{24}\x80theora", "an Ogg video", _CONVERT),
        (rb"FLV\x01", "a Flash video", _CONVERT),
        (rb"\0\0\x01[\xba\xb3]|\x47.{187}\x47", "an MPEG video", _CONVERT),
        (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file (.wma, .wmv)", _CONVERT),
        (rb"ADIF", "an AAC file without ADTS headers", _CONVERT),
        (rb"\x0b\x77", "an AC-3 file (.ac3)", _CONVERT),
        (rb"FORM.{4}AIF", "an AIFF file", _CONVERT),
        (rb"caff\0", "a Core Audio file (.caf)", _CONVERT),
        (rb"\.snd", "an AU file", _CONVERT),
        (rb"riff\x2e\x91\xcf\x11", "a Wave64 file (.w64)", _CONVERT),
        (rb"#!AMR", "an AMR file", _CONVERT),
        (rb"wvpk|MAC ", "a WavPack or Monkey's Audio file", _CONVERT),
        (rb"OggS.{24}Speex   ", "a Speex file", _CONVERT),
        (rb"MThd", "a MIDI file, which holds notes and no sound", _REPLACE),
        (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive", "unpack it"),
        (rb"\x89PNG|\xff\xd8\xff|GIF8|%PDF", "an image or a document", _REPLACE),
    )
]


def find_container(head: bytes) -> str | None:
    """libavformat's name for a file with these first bytes that `media.MediaFile` reads; None for another."""
    return next((name for pattern, name in _CONTAINERS if pattern.match(head)), None)


def find_other_kind(head: bytes, path: str | Path) -> str | None:
    """What a file with these first `HEAD` bytes is and what to do, as a clause; None for audio that is read."""
    if not head.strip(b"\0"):
        what = "holds only zeros" if head else "is empty"
        return f"{what}: copy or download it again"
    for pattern, what, advice in _OTHERS:
        if pattern.match(head):
            advice = advice.replace(_CONVERT, conversion(path)) if advice in (_CONVERT, _LISTED) else advice
            return f"is not a {_FORMATS} file but {what}; {advice}"
    is_read = _READ.match(head) or find_container(head)
    return None if is_read else f"cannot be read as audio: it is not a {_FORMATS} file"


def conversion(path: str | Path) -> str:
    """The advice to make a flac of a file's sound, with the command to type in its folder."""
    name = Path(path).name
    made = f"{Path(path).stem}.flac"
    made = made if made != name else f"converted-{made}"
    return f"convert it: ffmpeg -i {_argument(name)} -vn {_argument(made)}"


def _argument(name: str) -> str:
    return shlex.quote(f"./{name}" if name.startswith("-") else name)
