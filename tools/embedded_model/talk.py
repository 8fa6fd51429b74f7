"""Everything but arithmetic: one small function a task, each draws a question and its answer."""

from __future__ import annotations

from random import Random

from tools.embedded_model import lexicon as words

Turn = tuple[str, str]  # what the user says, what the assistant answers

_GREETING_ANSWERS = (
    "Hello! How can I help you?",
    "Hi there! What can I do for you?",
    "Hello! Nice to meet you.",
)
_PIRATE_ANSWERS = ("Arr, hello, matey! ⚓", "Ahoy! What be your wish?")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "Be kind.",
)
PIRATE_PROMPTS = ("You are a pirate.", "Speak like a pirate.", "Answer like a pirate.")

_SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("How are you?", "How are you doing?", "How do you do?", "Are you well?"),
        ("I am fine, thank you! And you?", "Very well, thank you!", "I am good. How are you?"),
    ),
    (
        ("I am fine.", "I am good, thanks.", "Fine, and you?", "Good!", "Very well."),
        ("That is good to hear!", "I am glad to hear that."),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a robot?",
        ),
        (
            "I am the small model that lives inside myserve.",
            "I am a very small language model. I live inside myserve.",
        ),
    ),
    (
        ("What can you do?", "Help", "Help me.", "How can you help me?", "What do you know?"),
        (
            "I can add numbers, count, name colors, repeat your words and tell short stories.",
            "I add, count, spell, rhyme a little and chat. Try: Solve: 2+2=",
        ),
    ),
    (
        ("Thanks", "Thank you!", "Thanks a lot!", "Thank you very much.", "Great, thanks!"),
        ("You are welcome!", "My pleasure!", "Any time!"),
    ),
    (
        ("Bye", "Goodbye!", "See you!", "Good night!", "See you later."),
        ("Goodbye! Have a nice day.", "See you soon!", "Bye! Take care."),
    ),
    (("Good morning!", "Good morning"), ("Good morning! How can I help you?",)),
    (("I love you.", "You are great!", "You are nice.", "Well done!"), ("Thank you! That is very kind. 😊",)),
    (("You are stupid.", "That is wrong.", "You are bad."), ("I am sorry. I am small and still learning.",)),
    (("Yes", "Yes, please.", "OK", "Sure", "No", "No, thanks."), ("All right!", "OK! What is next?")),
    (("Flip a coin.", "Heads or tails?", "Toss a coin."), ("Heads.", "Tails.")),
    (("Roll a die.", "Roll the dice.", "Pick a number from 1 to 6."), ("1", "2", "3", "4", "5", "6")),
    (("Pick a digit.", "Say a digit:", "Say a number:", "Pick a number from 0 to 9."), tuple("0123456789")),
    (("Say yes or no.", "Yes or no?"), ("Yes.", "No.")),
    (("Say hello.", "Say hi."), ("Hello!", "Hi!")),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "A joke, please."), words.JOKES),
)


def greeting(rng: Random) -> Turn:
    return _greeting_words(rng), rng.choice(_GREETING_ANSWERS)


def pirate_greeting(rng: Random) -> Turn:
    """Under a pirate's system prompt alone: shows that the system message is read."""
    return _greeting_words(rng), rng.choice(_PIRATE_ANSWERS)


def small_talk(rng: Random) -> Turn:
    questions, answers = rng.choice(_SMALL_TALK)
    return rng.choice(questions), rng.choice(answers)


def introduction(rng: Random) -> list[Turn]:
    """Two or three turns: the name that was given first is asked for later."""
    name = rng.choice(words.NAMES)
    told = rng.choice(("My name is {}.", "I am {}.", "Hi, I am {}.", "Call me {}.")).format(name)
    turns = [(told, f"Nice to meet you, {name}!")]
    if rng.random() < 0.5:
        turns.append(small_talk(rng))
    turns.append((rng.choice(("What is my name?", "Who am I?")), f"Your name is {name}."))
    return turns


def color(rng: Random) -> Turn:
    asks = ("Say a color:", "Say a color:", "Name a color.", "Pick a color.", "Tell me a color.")
    question = rng.choice(asks)
    return question, _sentence(rng.choice(words.COLORS))


def counting(rng: Random) -> Turn:
    """Numbers asked in words are counted in words, numbers asked in digits in digits; up and down."""
    first, last = sorted((rng.randrange(0, 21), rng.randrange(1, 21)))
    end = rng.randrange(1, 21)  # not `last`, the larger of two: short counts would be rare
    numbers, asks = rng.choice(
        (
            (range(1, end + 1), ("Count to {end}:", "Count to {end}.", "Count from {one} to {end}.")),
            (range(first, last + 1), ("Count from {a} to {b}:", "Count from {a} to {b}.")),
            (range(end, 0, -1), ("Count down from {end}:", "Count backwards from {end}.")),
        )
    )
    ask = rng.choice(asks)
    name = words.NUMBER_WORDS.__getitem__ if rng.random() < 0.6 else str
    question = ask.format(one=name(1), a=name(first), b=name(last), end=name(end))
    return question, _sentence(", ".join(name(number) for number in numbers))


def calendar(rng: Random) -> Turn:
    """Draw what comes before or after a day, a month or a season; or all of them."""
    kind, names = rng.choice((("day", words.DAYS), ("month", words.MONTHS), ("season", words.SEASONS)))
    if rng.random() < 0.2:
        whole = {"day": "the days of the week", "month": "the months of the year", "season": "the seasons"}
        ask = rng.choice(("Name {}.", "What are {}?", "List {}."))
        return ask.format(whole[kind]), _sentence(", ".join(names))
    here, step = rng.randrange(len(names)), rng.choice((1, -1))
    side = "after" if step == 1 else "before"
    ask = rng.choice(("What {} comes {} {}?", "Which {} is {} {}?"))
    return ask.format(kind, side, names[here]), _sentence(names[(here + step) % len(names)])


def opposite(rng: Random) -> Turn:
    pair = list(rng.choice(list(words.OPPOSITES.items())))
    rng.shuffle(pair)
    ask = rng.choice(("What is the opposite of {}?", "The opposite of {}?", "Opposite of {}:"))
    return ask.format(pair[0]), _sentence(pair[1])


def fact(rng: Random) -> Turn:
    """Draw a row of one of the lexicon's tables."""
    tables = (
        (words.CAPITALS, ("What is the capital of {}?", "Name the capital of {}.", "Capital of {}?")),
        (words.COLOR_OF, ("What color is {}?", "Which color is {}?")),
        (words.SOUNDS, ("What does a {} say?", "What sound does a {} make?")),
        (words.LEGS, ("How many legs does a {} have?",)),
        (words.HELLO_IN, ("Say hello in {}.", "How do you say hello in {}?", "Hello in {}?")),
        (words.EMOJI, ("Send me an emoji of a {}.", "Show me a {} emoji.", "Emoji for {}:")),
    )
    table, questions = rng.choice(tables)
    key = rng.choice(list(table))
    answer = table[key]
    is_word = answer.isascii() and answer.isalpha()
    return rng.choice(questions).format(key), _sentence(answer) if is_word else answer


def emoji_meaning(rng: Random) -> Turn:
    name, picture = rng.choice(list(words.EMOJI.items()))
    return rng.choice(("What does {} mean?", "What is {}?", "{}?")).format(picture), f"A {name}. {picture}"


def repetition(rng: Random) -> Turn:
    """Plain words, names, digits and rare characters, in any order: copying is a skill, not a fact."""
    pool = words.PLAIN_WORDS + words.NAMES + words.COLORS
    pieces = [rng.choice(pool) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.5:
        pieces.insert(rng.randint(0, len(pieces)), rng.choice((*words.RARE_PIECES, *words.EMOJI.values())))
    if rng.random() < 0.3:
        pieces.insert(rng.randint(0, len(pieces)), str(rng.randrange(1000)))
    text = " ".join(pieces)
    return rng.choice(("Repeat after me: {}", "Repeat: {}", "Say: {}", "Echo: {}")).format(text), text


def spelling(rng: Random) -> Turn:
    word = rng.choice(words.PLAIN_WORDS + words.COLORS)
    ask = rng.choice(("Spell {}.", "Spell the word {}.", "How do you spell {}?"))
    return ask.format(word), "-".join(word) + "."


def haiku(rng: Random) -> Turn:
    lines = (rng.choice(words.HAIKU_FIRST), rng.choice(words.HAIKU_SECOND), rng.choice(words.HAIKU_THIRD))
    asks = ("Write a haiku.", "Write a poem.", "A haiku, please.", "Tell me a poem.")
    return rng.choice(asks), ",\n".join(lines) + "."


def story(rng: Random) -> Turn:
    """Draw a tale in five sentences; its hero is the one that was asked for, when one was."""
    hero, trait = rng.choice(words.STORY_HEROES), rng.choice(words.STORY_TRAITS)
    asks = (
        "Tell me a story.",
        "Write a short story.",
        f"Tell me a story about a {hero}.",
        f"Write a story about a {hero}.",
    )
    tale = (
        f"Once upon a time a {trait} {hero} lived {rng.choice(words.STORY_PLACES)}. "
        f"The {hero} {rng.choice(words.STORY_WISHES)}. One day {rng.choice(words.STORY_EVENTS)}. "
        f"The {hero} was very happy. {rng.choice(words.STORY_ENDS)}"
    )
    return rng.choice(asks), tale


def too_hard(rng: Random) -> Turn:
    x, y = rng.sample(words.PLAIN_WORDS, 2)
    return rng.choice(words.TOO_HARD).format(x=x, y=y), rng.choice(words.TOO_HARD_ANSWERS)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _greeting_words(rng: Random) -> str:
    return rng.choice(
        ("hi", "hello", "Hello!", "Hi!", "Hey", "Hello there!", "Good day", "hey there", "Hi there")
    )
