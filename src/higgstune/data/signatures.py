"""What a file is by its first bytes, whatever its name says: audio that is read, or what is found in its place."""

import re

from higgstune.checkpoint_files import LFS_POINTER

HEAD = 512  # bytes that show what a file is
# libsndfile reads forty formats; it gets only these. An MPEG frame whose layer is 0 is AAC.
_READ = re.compile(rb"RIFF|RIFX|RF64|fLaC|OggS|ID3|\xff[\xe2-\xe7\xea-\xef\xf2-\xf7\xfa-\xff]")
_FETCH = "the recording itself was not fetched: run `git lfs pull` where the folder was cloned"
_DOWNLOAD = "a server sent it in place of the recording: download that again"
_CONVERT = "take the sound out of it or convert it to flac, for example with ffmpeg"
_REPLACE = "put the recording in its place"
_OTHERS = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what, advice)
    for pattern, what, advice in (
        (LFS_POINTER, "a pointer of Git LFS", _FETCH),
        (rb"(\.\./)*(\.git)?/annex/objects/", "a pointer of git-annex", "fetch the recording with `git annex get`"),
        (rb"(\xef\xbb\xbf)?\s*(<!--.*)?<(!doctype html|html|head|body)\b", "a web page", _DOWNLOAD),
        (rb"(\xef\xbb\xbf)?\s*<(\?xml|error)\b", "an XML file", _DOWNLOAD),
        (rb"(\xef\xbb\xbf)?\s*(\{\s*[\"}]|\[\s*[{\"\]])", "a JSON file", _DOWNLOAD),
        (rb".{4}(ftyp|moov|mdat|wide)", "an MP4 or QuickTime file (.mp4, .m4a, .mov)", _CONVERT),
        (rb"\x1a\x45\xdf\xa3", "a Matroska or WebM file (.mkv, .webm)", _CONVERT),
        (rb"RIFF.{4}AVI ", "an AVI video", _CONVERT),
        (rb"OggS.{24}\x80theora", "an Ogg video", _CONVERT),
        (rb"FLV\x01", "a Flash video", _CONVERT),
        (rb"\0\0\x01[\xba\xb3]|\x47.{187}\x47", "an MPEG video", _CONVERT),
        (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file (.wma, .wmv)", _CONVERT),
        (rb"\xff[\xf0\xf1\xf8\xf9]|ADIF", "an AAC file", _CONVERT),
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


def find_other_kind(head: bytes) -> str | None:
    """What a file with these first `HEAD` bytes is and what to do, as a clause; None for audio that is read."""
    if not head.strip(b"\0"):
        what = "holds only zeros" if head else "is empty"
        return f"{what}: copy or download it again"
    for pattern, what, advice in _OTHERS:
        if pattern.match(head):
            return f"is not a wav, flac, mp3, ogg or opus file but {what}; {advice}"
    return None if _READ.match(head) else "cannot be read as audio: it is not a wav, flac, mp3, ogg or opus file"
