"""The demo's sentences: a template grammar over our own word lists, and a list written by hand.

The grammar gives far more than 100,000 distinct sentences of 4 to 12 words; the hand-written ones use the
same vocabulary, so a miniature base trained on the first kind can be adapted with the second.
"""

import random
from collections.abc import Iterator

WORDS = {
    "person": """the teacher|the doctor|the farmer|the baker|the painter|the captain|the nurse|the judge
        |the pilot|the singer|the driver|the neighbor|the young boy|the tall girl|the old woman
        |the old man|the quiet child|a stranger|my mother|my father|my sister|my brother|my cousin
        |my uncle|my aunt|my best friend|our guide|our coach|his daughter|her son|their grandmother
        |your boss|the shy student|the new cook|everyone|nobody""",
    "noun": """table|chair|window|door|bottle|basket|box|letter|book|picture|map|key|lamp|clock|bell
        |knife|spoon|plate|cup|bowl|blanket|pillow|jacket|shirt|hat|shoe|coat|ring|purse|wallet|ticket
        |camera|radio|phone|piano|guitar|drum|flute|hammer|ladder|rope|bucket|shovel|wheel|engine|boat
        |bicycle|wagon|fence|gate|bridge|tower|statue|garden|flower|tree|branch|leaf|stone|feather|shell
        |coin|jewel|treasure|puzzle|toy|ball|kite|candle|mirror|brush|towel|sponge|needle|thread|button
        |ribbon|envelope|package|newspaper|magazine|poem|story|song|message|sign|flag|tent|sack|cage
        |horse|sheep|chicken|rabbit|puppy|kitten|parrot|turtle|fish|cake|pie|sandwich|orange|apple|peach
        |pear|lemon|melon|pumpkin|carrot|potato|onion|mushroom|cookie|pancake|egg""",
    "plural": """books|chairs|windows|letters|keys|bottles|boxes|birds|horses|dogs|cats|children|farmers
        |soldiers|flowers|trees|apples|oranges|peaches|cookies|eggs|coins|stones|shells|ships|trains
        |tickets|pictures|stories|candles|shoes|gloves|mushrooms|tomatoes|potatoes|clouds|mountains
        |rivers|houses|villages|bridges|pages|questions|answers|songs|toys|boys|girls|wolves|foxes|ducks
        |bees""",
    "mass": """bread|butter|cheese|honey|milk|coffee|tea|soup|rice|sugar|salt|pepper|juice|water
        |chocolate|ice cream|fresh fruit|fried fish|warm toast|roast beef|cold lemonade|hot chicken broth""",
    "adjective": """small|large|red|blue|green|yellow|purple|brown|black|white|gray|golden|silver|old|new
        |broken|clean|dirty|heavy|light|long|short|round|square|soft|smooth|rough|sharp|strange|beautiful
        |ugly|cheap|precious|tiny|huge|wooden|plastic|empty|dusty|shiny|quiet|favorite|wonderful|useful
        |lovely|thick|thin|wide|narrow""",
    "state": """very old|quite cheap|too heavy|almost new|really beautiful|rather strange|ready|missing
        |broken|empty|too small|much better|very useful|still wet|full of water|covered with dust
        |under the chair|on the shelf|not far away|behind you|worth a fortune|just perfect|hard to find
        |easy to fix|painted yellow|out of sight""",
    "mood": """happy|angry|tired|hungry|thirsty|nervous|busy|lucky|proud|afraid|curious|calm|cheerful
        |worried|sleepy|surprised|very kind|much too loud|rather shy|quite ill|ready to go|late again
        |full of joy""",
    "place": """in the kitchen|in the garden|at the station|near the river|by the lake|on the roof
        |under the bridge|behind the house|in the cellar|at the market|beside the road|in the village
        |on the beach|at school|in the forest|near the church|above the shop|on the table|in the corner
        |across the street|at the airport|in the mountains|outside the theater|next to the window
        |inside the barn|around the corner|in the museum|on the third floor|at the harbor|in the hospital
        |between the trees|in the north""",
    "toward": """to the market|to the station|into the garden|across the bridge|along the river
        |through the forest|down the hill|up the stairs|toward the harbor|over the fence|out of the room
        |past the church|home|back inside|around the lake|to the theater|into the cave|through the crowd
        |to the edge of town|down the narrow road""",
    "before": """yesterday|last night|last week|last Thursday|this morning|an hour ago|two days ago
        |in the winter|after lunch|before breakfast|on Monday|at noon|in January|long ago
        |during the storm|all afternoon|early in the spring|just now|at the weekend""",
    "after": """tomorrow|tonight|next week|next year|on Friday|on Tuesday|in the evening|after dinner
        |before sunrise|at five o'clock|at half past seven|in a few minutes|soon|as usual|in June
        |on her birthday|every Saturday|right away|without any help|with great pleasure""",
    "does": """keeps|sells|makes|opens|reads|plays with|knows|wants|carries|needs|loves|breaks|hates|uses
        |wins|sees""",
    "number": """two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|fifty
        |a hundred|a few|several|many|too many|hundreds of""",
    "manner": """slowly|quickly|quietly|carefully|suddenly|gently|happily|nervously|proudly|silently
        |without a word|once again|as fast as possible|with a smile|alone|together|in the dark
        |by accident""",
    "weather": """cold|warm|windy|cloudy|foggy|freezing|stormy|sunny|dry|very humid|dark outside|pouring
        |unusually hot|too bright|quite chilly""",
    "moved": """walked|ran|drove|hurried|climbed|jumped|wandered|marched|rushed|crawled|sailed|rode|moved
        |went|came|traveled|stumbled|danced""",
    "idea": """the answer is wrong|the plan will work|the road is closed|the train is late
        |the shop is open|the weather will change|the choice is yours|nothing is impossible
        |the price is fair|the music is too loud|the job is finished|the voice was familiar
        |the noise came from the engine|the world is round|the decision was right|both of them are right
        |she has a point|he should apologize|they need more time|we have enough money|it was only a joke
        |the wind woke the baby|nobody knows the way|the rain comes from the sea
        |the path to the island is good|one line is different|the judge's glass was empty
        |the dog is asleep|she listened but said nothing|every walk makes him happy
        |the fog comes at night""",
    "opening": """I think|I am sure|we all know|people say|it is true|he believes|she told us|they hope
        |perhaps|I suppose|everybody thought|the paper says|of course|my father always said""",
    "verb": """carry/carried|find/found|paint/painted|open/opened|close/closed|break/broke|fix/fixed
        |buy/bought|sell/sold|bring/brought|hide/hid|lose/lost|throw/threw|catch/caught|hold/held
        |wash/washed|push/pushed|pull/pulled|choose/chose|draw/drew|borrow/borrowed|touch/touched
        |watch/watched|drop/dropped|cover/covered|measure/measured|move/moved|lift/lifted|take/took
        |keep/kept|show/showed|send/sent|give away/gave away|pick up/picked up|put down/put down
        |look at/looked at|ask for/asked for|describe/described|leave/left|examine/examined|clean/cleaned
        |destroy/destroyed|remember/remembered|forget/forgot|enjoy/enjoyed|discover/discovered
        |protect/protected|wrap/wrapped|polish/polished|share/shared|follow/followed|notice/noticed
        |write about/wrote about|repair/repaired|pay for/paid for|think about/thought about|join/joined
        |use/used|read/read|shake/shook|fetch/fetched""",
}

TEMPLATES = """{person} {did} {thing} {place}.|{person} {did} {thing} {before}.|{person} {did} {thing}.
    |{before}, {person} {did} {thing}.|{person} will {do} {thing} {after}.
    |please {do} {thing} {place}.|please {do} {thing} {after}.|did {person} {do} {thing} {before}?
    |can you {do} {thing} for {person}?|could we {do} {thing} {after}?
    |where did {person} {do} {thing}?|why did you {do} {thing}?|{thing} {place} was {state}.
    |{thing} is {state}.|I think {thing} was {state}.|is {thing} {state}?|there is {a_thing} {place}.
    |there were {number} {plural} {place}.|we saw {number} {plural} {place}.
    |{person} counted {number} {plural} {before}.
    |{number} {plural} and {number} {plural} were {place}.|{person} {moved} {toward}.
    |{person} {moved} {toward} {manner}.|{before}, {person} {moved} {toward}.
    |{person} was {mood} {before}.|{person} looked {mood} and {moved} {toward}.
    |you seem {mood} today.|it was {weather} {before}.|it will be {weather} {place} {after}.
    |{opening} {idea}.|{opening} that {idea}.|{person} asked for {mass} and {mass}.
    |{person} likes {mass} with {mass}.|would you like some {mass} or {mass}?
    |we had {mass} {place} {before}.|bring me {number} {plural} and some {mass}.
    |{person} never {did} {thing}.|{person} tried to {do} {thing} {manner}.
    |do not {do} {thing} {place}.|{opening} {person} {did} {thing}.
    |if it is {weather}, we can {do} {thing}.|when {person} {moved} {toward}, it was {weather}.
    |{person} gave {a_thing} to {person}.|the {plural} {place} are {adjective} and {adjective}.
    |these {plural} are {adjective}.|how many {plural} did {person} {do}?
    |{person} needs {a_thing} {after}.|{adjective} {plural} are {state}.
    |{plural} and {plural} were {place}.|what happened to {thing}?|who {did} {thing} {before}?
    |{person} waited until it was {weather}.|{person} {does} {a_thing}.
    |{person} always {does} {thing} {place}.|{person} was asleep, but {person} {moved} {toward}.
    |{person} could not {do} {thing}, but {idea}.|{person} listened and {moved} {toward}."""

DEMO_SENTENCES = (
    "The farmer carried a heavy basket to the market.",
    "My sister painted the old door bright yellow.",
    "We saw seven white birds near the river.",
    "Please close the window before the storm comes.",
    "The teacher asked for a cup of hot tea.",
    "Last night the captain told us a strange story.",
    "Her brother found a silver coin on the beach.",
    "The train to the village is late again.",
    "I think the blue jacket is still wet.",
    "Our guide moved slowly through the dark forest.",
    "The baker brought fresh bread on Saturday morning.",
    "They hope the weather will change tomorrow.",
    "The young boy dropped his toy in the garden.",
    "My uncle drove across the bridge in the rain.",
    "There were seven candles on the birthday cake.",
    "The doctor wrote a short letter to my mother.",
    "Did you remember to bring the house key?",
    "We had soup and warm toast after lunch.",
    "The puppy jumped over the wooden gate.",
    "A stranger left this package at the door.",
    "The music in the theater was too loud.",
    "She keeps her treasure in a small round box.",
    "The pilot looked tired but very happy.",
    "Nobody knows who broke the kitchen clock.",
    "My father always enjoyed a quiet walk at noon.",
    "The children counted several ships in the harbor.",
    "Where did the painter hide the golden ring?",
    "The nurse gave my cousin a glass of water.",
    "It was windy and cold in the mountains.",
    "The singer forgot the last line of the song.",
    "I would like some rice with fried fish.",
    "The tall girl took her bicycle to school.",
    "We should choose another place next time.",
    "The old man repaired the engine of the boat.",
    "Can you show me the way to the station?",
    "The farmer bought a huge orange pumpkin.",
    "The horse ran toward the edge of town.",
    "Everyone was surprised by her answer.",
    "The mirror on the third floor is broken.",
    "He measured the table and the two chairs.",
    "The shop near the station opens after lunch.",
    "My best friend plays the guitar and the flute.",
    "The cook put too much pepper in the soup.",
    "A white cloud covered the mountain this morning.",
    "The kitten is asleep under the brown blanket.",
    "They polished the bell until it was shiny.",
    "The student read several pages in one evening.",
    "How many tickets did your brother buy?",
    "The path behind the church is very narrow.",
    "She wrapped the cookies in clean white paper.",
    "The driver waited for us outside the museum.",
    "His daughter picked up a smooth black stone.",
    "Would you like milk or sugar in your coffee?",
    "The noise from the street woke the baby.",
    "We sailed around the island with a good wind.",
    "The judge listened carefully to every word.",
    "My grandmother told us to share the peaches.",
    "The lamp in the corner makes a soft light.",
    "What did the young student say about the poem?",
    "The children hurried home as fast as possible.",
)  # fmt: skip

_LISTS = {name: [word.strip() for word in words.split("|")] for name, words in WORDS.items()}
_TEMPLATES = [template.strip() for template in TEMPLATES.split("|")]


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeio" else f"a {phrase}"


def _slots(rng: random.Random) -> dict[str, str]:
    """One drawing for every slot that occurs once in a template."""
    slots = {name: rng.choice(words) for name, words in _LISTS.items()}
    base, past = slots.pop("verb").split("/")
    noun = slots["noun"] if rng.random() < 0.5 else f"{slots['adjective']} {slots['noun']}"
    thing = rng.choice(["the", "the", "my", "her", "your", "that", "this", "their"]) + " " + noun
    return slots | {"do": base, "did": past, "thing": thing, "a_thing": _with_article(noun)}


def _sentence(rng: random.Random) -> str:
    """Every slot of a template is drawn anew, so that `{plural} and {plural}` names two things."""
    text = rng.choice(_TEMPLATES)
    while "{" in text:
        start, end = text.index("{"), text.index("}")
        text = text[:start] + _slots(rng)[text[start + 1 : end]] + text[end + 1 :]
    return text[0].upper() + text[1:]


def sentences(seed: int = 0, *, min_words: int = 4, max_words: int = 12) -> Iterator[str]:
    """Endless distinct sentences of the grammar, none of them a demo sentence. The same for the same seed."""
    rng = random.Random(seed)
    seen = set(DEMO_SENTENCES)
    while True:
        text = _sentence(rng)
        if text not in seen and min_words <= len(text.split()) <= max_words:
            seen.add(text)
            yield text
