"""The demo's sentences: a template grammar over our own word lists, random words, and lists written by hand.

The miniature base learns from sentences of the grammar and from random words of the lexicon in a row. In those only the
text says what comes next, so that the model must read; and every word occurs about equally often. The sentences written
by hand have the same words, and no corpus has these sentences.
"""

import random
import re
from collections.abc import Iterator

RANDOM_SHARE = 0.5  # of the sentences are random words

WORDS = {
    "person": """the teacher|the doctor|the farmer|the baker|the painter|the captain|the nurse|the judge|
        the pilot|the singer|the driver|the neighbor|the young boy|the tall girl|the old woman|
        the old man|the quiet child|a stranger|my mother|my father|my sister|my brother|
        my cousin|my uncle|my aunt|my best friend|our guide|our coach|his daughter|her son|
        their grandmother|your boss|the shy student|the new cook|everyone|nobody""",
    "noun": """table|chair|window|door|bottle|basket|box|letter|book|picture|map|key|lamp|clock|
        bell|knife|spoon|plate|cup|bowl|blanket|jacket|shirt|hat|shoe|coat|ring|ticket|
        camera|radio|phone|piano|guitar|flute|engine|boat|bicycle|gate|bridge|tower|garden|
        flower|tree|branch|leaf|stone|shell|coin|treasure|toy|ball|candle|mirror|envelope|
        package|poem|story|song|message|sign|horse|sheep|chicken|rabbit|puppy|kitten|fish|
        cake|pie|orange|apple|lemon|pumpkin|cookie|egg""",
    "plural": """books|chairs|windows|letters|keys|bottles|boxes|birds|horses|dogs|cats|children|
        farmers|flowers|trees|apples|oranges|peaches|cookies|eggs|coins|stones|shells|ships|
        trains|tickets|pictures|stories|candles|shoes|clouds|mountains|rivers|houses|villages|
        bridges|pages|questions|answers|songs|toys|boys|girls""",
    "mass": """bread|butter|cheese|honey|milk|coffee|tea|soup|rice|sugar|salt|pepper|juice|water|
        chocolate|ice cream|fresh fruit|fried fish|warm toast|roast beef""",
    "adjective": """small|large|red|blue|green|yellow|brown|black|white|gray|golden|silver|old|new|
        broken|clean|dirty|heavy|light|long|short|round|soft|smooth|strange|beautiful|cheap|
        tiny|huge|wooden|empty|shiny|quiet|favorite|wonderful|useful|lovely|wide|narrow""",
    "state": """very old|quite cheap|too heavy|almost new|really beautiful|rather strange|ready|missing|
        broken|empty|too small|much better|very useful|still wet|full of water|covered with dust|
        under the chair|on the shelf|not far away|behind you|just perfect|hard to find|
        easy to fix|painted yellow|out of sight""",
    "mood": """happy|angry|tired|hungry|thirsty|busy|lucky|proud|afraid|curious|calm|worried|
        sleepy|surprised|very kind|much too loud|rather shy|quite ill|ready to go|late again|
        full of joy""",
    "place": """in the kitchen|in the garden|at the station|near the river|by the lake|on the roof|
        under the bridge|behind the house|at the market|beside the road|in the village|
        on the beach|at school|in the forest|near the church|above the shop|on the table|
        in the corner|across the street|at the airport|in the mountains|outside the theater|
        next to the window|around the corner|in the museum|on the third floor|at the harbor|
        in the hospital|between the trees|in the north""",
    "toward": """to the market|to the station|into the garden|across the bridge|along the river|
        through the forest|down the hill|up the stairs|toward the harbor|out of the room|
        past the church|home|back inside|around the lake|to the theater|through the crowd|
        to the edge of town|down the narrow road""",
    "before": """yesterday|last night|last week|last Thursday|this morning|an hour ago|two days ago|
        in the winter|after lunch|before breakfast|on Monday|at noon|in January|long ago|
        during the storm|all afternoon|early in the spring|just now|at the weekend""",
    "after": """tomorrow|tonight|next week|next year|on Friday|on Tuesday|in the evening|after dinner|
        before sunrise|at five o'clock|at half past seven|in a few minutes|soon|as usual|in June|
        on her birthday|every Saturday|right away|without any help|with great pleasure""",
    "does": """keeps|sells|makes|opens|reads|plays with|knows|wants|carries|needs|loves|breaks|
        hates|uses|wins|sees""",
    "number": """two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|
        fifty|a hundred|a few|several|many|too many|hundreds of""",
    "manner": """slowly|quickly|quietly|carefully|suddenly|gently|happily|proudly|without a word|
        once again|as fast as possible|with a smile|alone|together|in the dark|by accident""",
    "weather": """cold|warm|windy|cloudy|stormy|sunny|dry|dark outside|too bright""",
    "moved": """walked|ran|drove|hurried|climbed|jumped|sailed|rode|moved|went|came|traveled|danced""",
    "idea": """the answer is wrong|the plan will work|the road is closed|the train is late|
        the shop is open|the weather will change|the choice is yours|the price is fair|
        the music is too loud|the job is finished|the noise came from the engine|the world is round|
        both of them are right|she has a point|they need more time|we have enough money|
        it was only a joke|the wind woke the baby|nobody knows the way|the rain comes from the sea|
        the path to the island is good|one line is different|the judge's glass was empty|
        the dog is asleep|she listened but said nothing|every walk makes him happy|
        the fog comes at night""",
    "opening": """I think|I am sure|we all know|people say|it is true|he believes|she told us|they hope|
        perhaps|I suppose|everybody thought|the paper says|of course|my father always said""",
    "name": """Anna|Tom|Mary|John|Peter|Lucy|David|Sarah|Emma|Jack|Alice|Ben""",
    "day": """Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday""",
    "month": """January|February|March|April|May|June|July|August|September|October|November|December""",
    "hour": """one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve""",
    "minutes": """five|ten|twenty|a quarter""",
    "ordinal": """first|second|third|fourth|fifth|tenth|twentieth|last""",
    "count": """thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy
        |eighty|ninety|a hundred|a thousand|two hundred|twenty five|thirty two|ninety nine""",
    "greeting": """good morning|good evening|good night|hello|thank you very much|how are you|welcome home|excuse me
        |see you soon|yes|no|I am sorry|nice to meet you""",
    "place2": """at work|in the city|at the hotel|in the office|at home|at the bank|in the restaurant
        |on the bus|in the car|on the train|at the door""",
    "verb": """carry/carried|find/found|paint/painted|open/opened|close/closed|break/broke|fix/fixed|
        buy/bought|sell/sold|bring/brought|hide/hid|lose/lost|throw/threw|catch/caught|hold/held|
        wash/washed|push/pushed|pull/pulled|choose/chose|draw/drew|touch/touched|watch/watched|
        drop/dropped|cover/covered|measure/measured|move/moved|lift/lifted|take/took|keep/kept|
        show/showed|send/sent|give away/gave away|pick up/picked up|put down/put down|
        look at/looked at|ask for/asked for|leave/left|clean/cleaned|remember/remembered|
        forget/forgot|enjoy/enjoyed|wrap/wrapped|polish/polished|share/shared|follow/followed|
        write about/wrote about|repair/repaired|pay for/paid for|think about/thought about|
        join/joined|use/used|read/read""",
}

TEMPLATES = """{person} {did} {thing} {place}.|{person} {did} {thing} {before}.|{person} {did} {thing}.
    |{name} will meet {name} at {hour} o'clock.|{name} came {place2} at half past {hour}.
    |the {ordinal} of {month} is a {day}.
    |it is {minutes} past {hour}.|it is {minutes} to {hour}.|{greeting}, {name}.|{greeting}, {name}, {idea}.
    |{name} and {name} were {place2} on {day}.|we need {count} {plural} on {day}.|{name} has {count} {plural}.
    |on the {ordinal} day, {name} {did} {thing}.|the meeting is at {hour} on {day}.
    |my name is {name}, what is your name?
    |{name} lives {place2} with {name}.|call {name} at {hour} tomorrow.|is {name} {place2} today?
    |in {month}, {name} {moved} {toward}.|{name} said that {idea}.|please tell {name} that {idea}.
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

# Words that everyday sentences need, and that no list above has.
EVERYDAY = """I you he she it we they me him us them who which whose this those here there then than such every
    each own same am be been being being do does done doing go goes going gone get got getting have
    having had make made making want wanted need needed like liked love loved help helped work worked
    eat ate drink drank sleep slept sit sat stand stood stop stopped start started begin began end
    ended talk talked speak spoke hear live lived play played learn learned teach call called wait
    walk run come give gave put say tell told ask answer write wrote see feel felt let try turn turned
    stay stayed know knew mean must might may should can cannot could will would shall great big
    little young late fast slow wrong better best worse bad sick well easy hard simple sweet fine free
    full high low deep strong weak rich poor hot also again almost already always another any anything
    because before after between both down during either else enough even ever far first if into just
    later least less more most much near never now of off often on once only or other over quite since
    so some something still today together too under until up very while why yet man woman men women
    people friend friends family father baby house home room bed floor wall street road town city
    world country place way part side line name word words number thing things time year month week
    day hour minute second night evening summer autumn winter spring sun moon sky star sea snow rain
    wind fire air light food dinner fruit meat car bus road money price job game music school class
    test color picture hand head eye eyes foot face heart voice body hair leg arm question reason idea
    problem plan story life doctor page paper computer"""

FUNCTION_WORDS = """the a an and or but of to in on at by for with from is are was were not my your his her our their
    that this it as if so there"""

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

# New sentences of the lexicon, for measurements: 60 for the base, then 40 for the voice that the demo teaches it.
HELD_OUT = (
    "Good morning, Anna, the coffee is ready on the table.",
    "My brother will call you on Wednesday at half past nine.",
    "The old clock in the kitchen is ten minutes slow.",
    "Please put the milk and the butter back on the shelf.",
    "We need two more chairs for the dinner on Sunday.",
    "Peter lost his keys near the station.",
    "The children played in the snow all afternoon.",
    "How much money do you have today?",
    "Lucy wants to learn the piano before the summer.",
    "The bus to the city will come at a quarter past eight.",
    "I could not sleep because the wind was so loud.",
    "The red boat sailed slowly around the island.",
    "Her grandmother lives in a small house by the sea.",
    "Can you help me find the way to the museum?",
    "Tom and Mary danced to the music all night.",
    "The nurse gave the sick man a glass of cold water.",
    "There are twelve eggs and some cheese in the basket.",
    "It will be warm and sunny on the third of July.",
    "The teacher asked a simple question, but nobody had an answer.",
    "David forgot his blue jacket in the car again.",
    "Our new neighbor plays the flute very well.",
    "The train was late, so we lost the first part of the game.",
    "She wrote a long letter to her best friend in October.",
    "What is the name of the young woman at the door?",
    "The farmer sold forty horses in the spring.",
    "Do you want chocolate or fruit after dinner?",
    "The light in the corner of the room is too bright.",
    "Emma never saw such a beautiful garden.",
    "They walked along the beach and talked about life.",
    "Jack paid a hundred and fifty for the broken bicycle.",
    "The baby is asleep, so please be quiet.",
    "We stayed at the hotel for seven days in August.",
    "The doctor said that fresh air is good for the heart.",
    "Nobody left a black hat on the chair.",
    "The water in the lake is cold even in June.",
    "Ben will start his new job on Monday at eight o'clock.",
    "I think the answer on page thirty is wrong.",
    "The captain showed the boys the engine of the boat.",
    "Alice bought bread, honey and a bottle of juice.",
    "The moon and the sky were very bright last night.",
    "Every Friday my aunt makes soup with chicken and rice.",
    "The dog jumped over the gate and ran into the forest.",
    "You should read this story, it is really wonderful.",
    "The road through the mountains is narrow and long.",
    "He closed the book and turned off the light.",
    "Sarah waited an hour for the bus in the rain.",
    "The price of the guitar is too high for me.",
    "John opened the window because it was hot.",
    "We can meet at the restaurant near the bridge.",
    "The white kitten likes to sit under the tree.",
    "It was dark and cold when they came home.",
    "His sister worked in the office on the second floor.",
    "May I have some more tea, please?",
    "The picture above the bed is very old.",
    "On Tuesday the shop is open until seven.",
    "I am sorry, but I do not know the answer.",
    "The boy threw the ball to his father.",
    "This is the best cake in the world.",
    "Thirty people came to the meeting in September.",
    "The singer has a soft and lovely voice.",
    "Thank you very much for the flowers, Mary.",
    "The pilot drank his coffee without milk or sugar.",
    "We saw three birds at the edge of the forest.",
    "Is there a bank between the church and the market?",
    "My uncle fixed the old radio with great pleasure.",
    "The woman in the green coat is a wonderful singer.",
    "They moved into the empty house last November.",
    "Please write your name and the day on the paper.",
    "The second answer is right, and the first is wrong.",
    "He looked out of the window and saw the first snow.",
    "Eleven ships left the harbor before sunrise.",
    "Nobody likes cold soup, not even the dog.",
    "Lucy told her mother a strange story about the sea.",
    "The little girl hid the coin in her shoe.",
    "How many days are there in February this year?",
    "The driver stopped the car at the side of the road.",
    "My cousin has a horse, two sheep and many dogs.",
    "She was tired but happy after the long walk.",
    "The tower is old and very high.",
    "Peter will never eat meat on Friday.",
    "We listened to the rain on the roof.",
    "The lemon cake needs more butter and less sugar.",
    "You seem worried, what is the problem?",
    "The painter used yellow and brown for the leaf.",
    "I would like to pay for the tickets now.",
    "The weather was better in the north of the country.",
    "Anna wrapped the box in silver paper.",
    "At noon the bell of the church woke the old man.",
    "The answer to your question is on the last page.",
    "The spoon is clean, but the knife is still dirty.",
    "He ate nine cookies and drank a glass of milk.",
    "Her voice was so quiet that nobody could hear it.",
    "The key to the garden gate is in the small box.",
    "Good evening, David, how was your day?",
    "They had no idea that the shop was closed on Saturday.",
    "The wind pushed the boat toward the stones.",
    "My best friend gave me a map of the world.",
    "In the evening the family sat around the fire.",
    "The judge held the letter up to the light.",
    "See you soon, and thank you for the help.",
)  # fmt: skip

# Ordinary prose: sentences with words that no corpus has.
PROSE = (
    "The committee postponed its decision until the following session.",
    "Photographs of the expedition were published in several magazines.",
    "She inherited a vineyard from a distant relative in Portugal.",
    "Engineers discovered a crack in the foundation of the dam.",
    "His grandfather repaired clocks in a workshop behind the cathedral.",
    "The museum acquired three sculptures by an unknown artist.",
    "Heavy traffic delayed the ambulance on its way downtown.",
    "A sudden breeze scattered the documents across the courtyard.",
    "The orchestra rehearsed the symphony throughout the weekend.",
    "Scientists measured the temperature of the ocean at various depths.",
    "Our landlord promised to replace the leaking faucet.",
    "The detective examined every fingerprint on the glass.",
    "They planted cabbages and turnips along the southern wall.",
    "The ferry crosses the channel twice a week during winter.",
    "An elderly gentleman fed pigeons beside the fountain.",
    "The lecture covered the history of medieval architecture.",
    "Smoke drifted over the valley after the harvest.",
    "Passengers complained about the narrow seats and stale sandwiches.",
    "The plumber climbed into the attic with a flashlight.",
    "Rumors of a merger spread quickly among the employees.",
    "The acrobat balanced a stack of saucers on his forehead.",
    "Volunteers distributed blankets to families after the earthquake.",
    "The senator avoided questions about the budget.",
    "A thick hedge surrounds the cemetery on the hill.",
    "The apprentice sharpened the chisels every morning.",
    "Lightning struck the chimney of the abandoned factory.",
    "The referee blew his whistle and stopped the match.",
    "Her essay compares two translations of the same novel.",
    "The goat chewed through the rope and escaped.",
    "Frost covered the windshield of the delivery truck.",
    "The pharmacist recommended a syrup for the cough.",
    "Tourists admired the mosaic on the ceiling of the chapel.",
    "The gardener trimmed the roses with great patience.",
    "A shepherd guided his flock across the muddy slope.",
    "The electrician installed a switch beside the staircase.",
    "Her nephew collects stamps from countries in Africa.",
    "The trumpet echoed through the empty stadium.",
    "Bakers knead the dough long before dawn.",
    "The sailor tied a knot and lowered the anchor.",
    "The witness described the suspect in remarkable detail.",
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


_FUNCTION = FUNCTION_WORDS.split()
LEXICON = sorted(
    {
        word
        for phrase in [*_TEMPLATES, *(p for phrases in _LISTS.values() for p in phrases), EVERYDAY, FUNCTION_WORDS]
        for word in re.findall(r"[A-Za-z']+", re.sub(r"\{\w+\}", " ", phrase))
    },
    key=lambda word: (word.lower(), word.swapcase()),
)


def _random_words(rng: random.Random) -> str:
    """Words of the lexicon in a row, about a third of them function words, sometimes with a comma."""
    words = [rng.choice(_FUNCTION if rng.random() < 0.3 else LEXICON) for _ in range(rng.randint(4, 10))]
    if rng.random() < 0.2:
        words[rng.randrange(1, len(words) - 1)] += ","
    return " ".join(words) + rng.choice("...?")


def _sentence(rng: random.Random) -> str:
    """Every slot of a template is drawn anew, so that `{plural} and {plural}` names two things."""
    if rng.random() < RANDOM_SHARE:
        text = _random_words(rng)
        return text[0].upper() + text[1:]
    text = rng.choice(_TEMPLATES)
    while "{" in text:
        start, end = text.index("{"), text.index("}")
        text = text[:start] + _slots(rng)[text[start + 1 : end]] + text[end + 1 :]
    return text[0].upper() + text[1:]


def sentences(seed: int = 0, *, min_words: int = 4, max_words: int = 12) -> Iterator[str]:
    """Endless distinct sentences of the grammar, none of them written by hand. The same for the same seed."""
    rng = random.Random(seed)
    seen = {*DEMO_SENTENCES, *HELD_OUT, *PROSE}
    while True:
        text = _sentence(rng)
        if text not in seen and min_words <= len(text.split()) <= max_words:
            seen.add(text)
            yield text
