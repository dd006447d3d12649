"""The page `higgstune review`: its requests, and their answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from higgstune.errors import DataError
from higgstune.pages.server import Reply, Request, Route, static_route
from higgstune.raw.proofreading import Behind, Filter, Review
from higgstune.raw.review_sound import Sounds

_PAGES = "higgstune.pages"
_STATIC = (
    "common.css",
    "common.js",
    "review.css",
    "review.js",
    "review_list.js",
    "review_panels.js",
    "review_sound.js",
    "review_text.js",
)
_MANY = 500  # rows in an answer


class ReviewApp:
    """The routes of a review."""

    def __init__(self, folder: Path) -> None:
        """Read the data set. Raises DataError where it is not a data set."""
        self.review = Review(folder)
        raw = self.review.summary.get("raw")
        self.sounds = Sounds(folder, raw if isinstance(raw, str) else None)

    def close(self) -> None:
        """Remove what was made for the page."""
        self.sounds.close()

    @property
    def routes(self) -> Mapping[str, Route]:
        """For `PageServer`."""
        return {
            "GET /": static_route(_PAGES, "review.html"),
            **{f"GET /{name}": static_route(_PAGES, name) for name in _STATIC},
            "GET /state": lambda _: Reply.of_json(self.review.state()),
            "GET /list": self._list,
            "GET /sound": self._sound,
            "GET /changes": self._changes,
            "POST /rows": self._rows,
            "POST /decide": self._decide,
        }

    def _list(self, request: Request) -> Reply:
        known = {key: request.query.get(key, "") for key in Filter.__dataclass_fields__}
        return Reply.of_json({"ids": self.review.ids(Filter(**known))})

    def _rows(self, request: Request) -> Reply:
        ids = _object(request).get("ids")
        if not isinstance(ids, list) or len(ids) > _MANY:
            raise DataError(f"a request names the ids of at most {_MANY} rows")
        return Reply.of_json({"rows": self.review.views(str(one) for one in ids)})

    def _sound(self, request: Request) -> Reply:
        found = self.review.sound_of(request.query.get("id", ""))
        if found is None:
            return Reply.of_json({"error": "there is no such utterance"}, 404)
        sound = self.sounds.sound(*found)
        places = {
            "X-Start": f"{sound.start:.4f}",
            "X-End": f"{sound.end:.4f}",
            "X-Context": str(int(sound.has_context)),
        }
        return Reply(sound.wav, "audio/wav", headers=places)

    def _changes(self, request: Request) -> Reply:
        self.review.refresh()
        return Reply.of_json(self.review.changes(_number(request.query.get("seen"))))

    def _decide(self, request: Request) -> Reply:
        body = _object(request)
        seen, generation = _number(body.get("seen")), _number(body.get("generation"))
        try:
            if "rename" in body:
                made = self.review.rename(seen, generation, str(body["rename"]), str(body.get("to", "")))
            else:
                made = self.review.decide(seen, generation, body.get("decision") or {})
        except Behind as behind:
            return Reply.of_json({"error": str(behind)} | self.review.changes(seen), 409)
        return Reply.of_json({"made": made} | self.review.changes(seen))


def _object(request: Request) -> dict[str, Any]:
    if not isinstance(request.body, dict):
        raise DataError("the request is not an object")
    return request.body


def _number(value: Any) -> int:
    try:
        return max(int(value), 0)
    except (TypeError, ValueError) as error:
        raise DataError("the request names no line that it has seen") from error
