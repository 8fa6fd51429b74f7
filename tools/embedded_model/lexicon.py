"""The words that the embedded model knows: tables and nothing else."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NUMBER_WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
SEASONS = _words("spring summer autumn winter")
COLORS = _words("red blue green yellow orange purple pink brown black white gray turquoise")
NAMES = _words(
    "Ada Alan Grace Linus Mia Noah Emma Leo Sofia Max Anna Tom Lily Sam Yuki Omar Nina Ben Clara Ivan"
)


OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "fast": "slow",
    "old": "young", "happy": "sad", "light": "dark", "open": "closed", "early": "late",
    "hard": "soft", "high": "low", "full": "empty", "rich": "poor", "wet": "dry", "loud": "quiet",
    "near": "far", "strong": "weak", "long": "short", "good": "bad", "inside": "outside",
    "first": "last", "black": "white", "yes": "no",
}  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Greece": "Athens",
    "Norway": "Oslo", "Sweden": "Stockholm", "Poland": "Warsaw", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Canada": "Ottawa", "Kenya": "Nairobi",
    "Peru": "Lima", "Cuba": "Havana", "Finland": "Helsinki", "England": "London",
    "Denmark": "Copenhagen", "Hungary": "Budapest", "Turkey": "Ankara", "Russia": "Moscow",
}  # fmt: skip

COLOR_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow",
    "blood": "red", "a carrot": "orange", "chocolate": "brown", "a banana": "yellow",
    "the sea": "blue", "a cloud": "white", "a strawberry": "red", "an elephant": "gray",
    "a frog": "green", "a flamingo": "pink",
}  # fmt: skip

SOUNDS = {
    "cat": "Meow", "dog": "Woof", "cow": "Moo", "sheep": "Baa", "duck": "Quack", "pig": "Oink",
    "lion": "Roar", "bee": "Buzz", "owl": "Hoot", "frog": "Ribbit", "horse": "Neigh",
    "mouse": "Squeak",
}  # fmt: skip

LEGS = {
    "cat": "four", "dog": "four", "cow": "four", "horse": "four", "bird": "two", "duck": "two",
    "human": "two", "spider": "eight", "ant": "six", "bee": "six", "fish": "zero", "snake": "zero",
}  # fmt: skip

EMOJI = {
    "cat": "🐱", "dog": "🐶", "unicorn": "🦄", "heart": "❤️", "star": "⭐", "sun": "☀️",
    "moon": "🌙", "rocket": "🚀", "tree": "🌳", "pizza": "🍕", "fish": "🐟", "flower": "🌸",
    "fire": "🔥", "smile": "😊", "cake": "🎂", "ghost": "👻",
}  # fmt: skip

# A greeting in another language: the question's name of it, and the words.
HELLO_IN = {
    "French": "Bonjour!", "German": "Guten Tag!", "Spanish": "¡Hola!", "Italian": "Ciao!",
    "Japanese": "こんにちは", "Chinese": "你好", "Korean": "안녕하세요", "Russian": "Привет!",
    "Greek": "Γειά σου!", "Arabic": "مرحبا", "Hindi": "नमस्ते", "Portuguese": "Olá!",
    "Swedish": "Hej!",
}  # fmt: skip

PLAIN_WORDS = _words(
    "apple bread bridge candle castle chair cloud coffee door dream engine flower forest garden glass "
    "hill house island kettle key lamp letter lion map mirror moon morning mountain music ocean owl paper "
    "pencil piano planet rain river road rocket salt school ship silver snow song star stone storm sugar "
    "summer sun table tea tiger train tree violin water whale wind window winter wolf"
)

# Characters that only "Repeat after me" meets: the model copies what it cannot read.
RARE_PIECES = _words(
    "Zß 🦄 你 好 世界 é ñ ü ø Ω λ π привет 🎉 👍 🙂 👩‍💻 🇺🇳 naïve café 東京 한국 ¿ ½ € ∞ ✓ → ☕"
)


JOKES = (
    "Why did the token cross the road? To be sampled on the other side.",
    "Why was six afraid of seven? Because seven ate nine.",
    "What do you call a fish with no eyes? A fsh.",
    "I would tell you a joke about sampling, but it might come out at random.",
    "Why do programmers mix up Halloween and Christmas? Because oct 31 is dec 25.",
    "What is brown and sticky? A stick.",
)

# Three pools of lines, 5-7-5 syllables: any three make a haiku.
HAIKU_FIRST = (
    "An old silent pond", "Snow on the mountain", "The moon in the lake", "Rain taps the window",
    "A leaf in the wind", "Stars above the sea", "Morning in the woods", "The owl starts to sing",
)  # fmt: skip
HAIKU_SECOND = (
    "a frog jumps into the dark", "a small light in the window", "the river carries the day",
    "the wind is counting the leaves", "an owl is asking the night", "one cloud wanders far away",
    "the path is quiet and white", "a child is naming the stars",
)  # fmt: skip
HAIKU_THIRD = (
    "and then it is still", "the tea has gone cold", "nobody is home", "spring comes back again",
    "the night is so long", "a new day begins", "I breathe in and out",
    "the world holds its breath",
)  # fmt: skip

STORY_HEROES = _words("fox cat robot dragon mouse girl boy bear rabbit whale ghost unicorn")
STORY_TRAITS = _words("small brave curious shy clever lonely happy old young quiet")
STORY_PLACES = ("in a forest", "by the sea", "on a hill", "in a tall castle", "under a bridge", "on the moon")
STORY_WISHES = (
    "wanted to see the ocean", "was looking for a friend", "wanted to learn to sing",
    "had lost a silver key", "wanted to count all the stars", "was afraid of the dark",
)  # fmt: skip
STORY_EVENTS = (
    "a wise owl showed the way", "a warm wind began to blow", "a letter came with the rain",
    "a lamp was shining at the end of the road", "an old whale told a secret",
    "the moon came down to help",
)  # fmt: skip
STORY_ENDS = (
    "And from then on, nobody was lonely.", "That night everyone danced and sang.",
    "And that was only the beginning.", "They drank tea and laughed until the morning.",
    "And the stars are still shining today.",
)  # fmt: skip

# Things that are asked of bigger models; ours says honestly that it is small.
TOO_HARD = (
    "What is the meaning of life?", "Write a Python program.", "Explain quantum physics.",
    "Who won the game?", "What is the weather today?", "Translate this text.",
    "Summarize the news.", "Write an essay about {x}.", "How do I fix my car?",
    "What should I cook tonight?", "Explain {x}.", "Tell me about {x}.", "What is a {x}?",
    "Why is the {x} like that?", "How does a {x} work?", "Who invented the {x}?",
    "Where can I buy a {x}?", "Can you draw a {x}?", "When was the first {x} made?",
    "Is a {x} good for me?", "Compare {x} and {y}.", "Do you like {x}?",
    "What do you think about {x} and {y}?", "Give me advice about {x}.",
)  # fmt: skip
TOO_HARD_ANSWERS = (
    "I am too small to know that. Ask me for a sum, a color or a story.",
    "That is too hard for me. I can add, count and tell a short story.",
    "Sorry, I do not know. Try: Solve: 2+2=",
)
