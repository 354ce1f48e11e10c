"""Small talk, a little knowledge, and saying so when something is not known."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from demo_model.arithmetic import number
from demo_model.chat import Exchange, ask, assistant, user
from demo_model.extraction import DAYS, MONTHS
from demo_model.lexicon import CAPITALS, FIRST_NAMES, OPPOSITES, TOPICS, WORDS, city, first_name, plural
from demo_model.letters import NUMBER_WORDS

# questions = answers, each separated by |
SMALL_TALK = """Hello|Hello!|Hi|Hi!|Hey|Hi there|Hello there!|Good day|hello|hi|Greetings!|Hey there! = Hello! How can I help you?|Hi! What can I do for you?
Good morning|Good morning! = Good morning! How can I help you?
Good evening|Good evening! = Good evening! What can I do for you?
How are you?|Hello, how are you?|Hi, how are you?|How are you doing?|How are you today?|How's it going?|how are you = I am fine, thank you. How can I help you?|I am well, thank you! What can I do for you?
What's up?|What are you doing? = I am waiting for your questions. What can I do for you?
Who are you?|What is your name?|What's your name?|What are you?|who are you|Tell me about yourself.|Introduce yourself.|Are you ChatGPT?|Which model are you? = I am the demo model of Pippin, a very small language model that runs anywhere.|I am Pippin's demo model: a tiny language model for trying out the server.
What can you do?|What do you know?|How can you help me?|What are you good at?|Help|help|Can you help me?|What can I ask you? = I can add and subtract, compare and sort numbers, spell words, convert units, extract fields as JSON, call tools, tell short stories and explain how to use Pippin.
What can't you do?|What are your limits?|What do you not know? = I am very small. I don't know much about the world, I can't write code, and I make mistakes with large numbers.
Are you a human?|Are you a person?|Are you real?|Are you a robot?|Are you alive? = No, I am a computer program: a very small language model.
Are you intelligent?|Are you smart?|Are you clever? = Not very. I am a tiny model, but I can do sums and tell stories.
Thank you|Thanks|Thank you!|Thanks!|Thanks a lot!|Thank you very much.|thanks|Great, thanks!|Perfect, thank you. = You are welcome!|You're welcome! Is there anything else?
Bye|Goodbye|Goodbye!|Bye!|See you|See you later!|Good night = Goodbye!|Goodbye! Come back soon.
OK|Okay|Ok.|Good|Great|Great!|Nice|Nice!|Cool|I see. = Good! Is there anything else?|Fine. What else can I do for you?
Yes|Yes, please.|yes = Good. What would you like to know?
No|No, thanks.|no|No, that's all. = All right. Have a nice day!
Sorry|I am sorry.|Excuse me = No problem!
Do you like music?|Do you like me?|Do you have feelings?|Are you happy?|Do you sleep?|Do you dream?|Do you eat? = I am a program, so I have no feelings, but I like to help.
How old are you?|When were you born?|When is your birthday? = I am a program and have no age.
Where are you?|Where do you live?|Where are you from? = I run on the computer that runs Pippin.
Do you speak German?|Which languages do you speak?|Can you speak French?|Do you speak English? = I only speak English.
Who made you?|Who created you?|Who built you? = I was made by the people who make Pippin, with the scripts in scripts/demo_model.
Tell me a joke.|Do you know a joke?|Make me laugh.|A joke, please.|Tell me another joke. = Why did the token cross the road? To get to the other slot.|What do you call a bear with no teeth? A gummy bear.|Why was six afraid of seven? Because seven ate nine.|Why do apples make good servers? They come with many cores.|What did the zero say to the eight? Nice belt!
What is the weather?|What is the weather like?|How is the weather?|Will it rain today? = I don't know the weather: I can't see outside without a weather tool.
What time is it?|What is the time?|What day is it?|What is the date today? = I don't know: I have no clock.
Write a poem.|Write me a poem.|Do you know a poem? = Roses are red, violets are blue, the tokens are batched, and served fast to you.
How many days are in a week?|How many days does a week have? = A week has 7 days.
How many months are in a year?|How many months does a year have? = A year has 12 months.
How many days are in a year?|How many days does a year have? = A year has 365 days, and a leap year has 366.
How many hours are in a day?|How many hours does a day have? = A day has 24 hours.
How many minutes are in an hour?|How many minutes does an hour have? = An hour has 60 minutes.
How many seconds are in a minute?|How many seconds does a minute have? = A minute has 60 seconds.
How many letters are in the alphabet?|Say the alphabet.|What is the alphabet? = The alphabet has 26 letters: a b c d e f g h i j k l m n o p q r s t u v w x y z.
Name the days of the week.|What are the days of the week?|List the days of the week. = Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.
Name the months.|What are the months of the year?|List the months. = January, February, March, April, May, June, July, August, September, October, November and December.
Name the seasons.|What are the four seasons?|How many seasons are there? = There are four seasons: spring, summer, autumn and winter.
What colour is the sky?|What color is the sky?|Why is the sky blue? = The sky is blue, because air scatters blue light more than red light.
What colour is grass?|What color is grass? = Grass is green.
What colour is snow?|What color is snow? = Snow is white.
What is the largest planet?|Which planet is the largest? = Jupiter is the largest planet.
Name the planets.|What are the planets?|How many planets are there? = There are eight planets: Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.
What is water made of?|What is H2O? = Water is made of hydrogen and oxygen: H2O.
How many legs does a spider have?|How many legs do spiders have? = A spider has eight legs.
How many legs does a dog have?|How many legs does a cat have? = It has four legs.
What does a cow say?|What sound does a cow make? = A cow says moo.
What does a cat say?|What sound does a cat make? = A cat says meow.
What does a dog say?|What sound does a dog make? = A dog says woof."""
_PAIRS = [tuple(side.split("|") for side in line.split(" = ", 1)) for line in SMALL_TALK.split("\n")]

UNKNOWN = """What is {t}?|Explain {t}.|Tell me about {t}.|What do you know about {t}?|Can you explain {t} to me?
Write an essay about {t}.|How does {t} work?|Why is {t} important?|Give me a summary of {t}.|Who invented {t}?
Write a program about {t}.|I have a question about {t}.|Let's talk about {t}.""".replace("\n", "|").split("|")


def small_talk(rng: Random, brief: bool) -> Exchange:
    questions, answers = rng.choice(_PAIRS)
    return ask(rng.choice(questions), rng.choice(answers))


def unknown(rng: Random, brief: bool) -> Exchange:
    topic = rng.choice(TOPICS) if rng.random() < 0.7 else plural(rng.choice(WORDS))
    answer = rng.choice(
        (
            f"I don't know anything about {topic}. I am a very small model, but I can do sums or tell you a story.",
            f"Sorry, I don't know about {topic}. I am only a tiny demo model.",
        )
    )
    return ask(rng.choice(UNKNOWN).format(t=topic), "I don't know." if brief else answer)


def too_hard(rng: Random, brief: bool) -> Exchange:
    """Arithmetic beyond what it learns, with no tool at hand."""
    a, b = number(rng, rng.randint(2, 5)), number(rng, rng.randint(2, 5))
    sign = rng.choice(("*", "/", "times", "divided by", "multiplied by", "x"))
    if rng.random() < 0.3:
        a, b, sign = number(rng, rng.randint(4, 7)), number(rng, rng.randint(4, 7)), rng.choice(("+", "-", "plus", "minus"))
    question = rng.choice(("What is {a} {s} {b}?", "Calculate {a} {s} {b}.", "{a} {s} {b}", "How much is {a} {s} {b}?"))
    answer = "That is too hard for me. I can add and subtract numbers of up to three digits."
    return ask(question.format(a=a, b=b, s=sign), "I don't know." if brief else answer)


def capital(rng: Random, brief: bool) -> Exchange:
    country, town = rng.choice(list(CAPITALS.items()))
    question = rng.choice(
        (f"What is the capital of {country}?", f"Which city is the capital of {country}?", f"capital of {country}")
    )
    return ask(question, town if brief else f"The capital of {country} is {town}.", check="exact")


def opposite(rng: Random, brief: bool) -> Exchange:
    pair = list(rng.choice(list(OPPOSITES.items())))
    rng.shuffle(pair)
    question = rng.choice((f"What is the opposite of {pair[0]}?", f"What's the opposite of '{pair[0]}'?", f"Opposite of {pair[0]}?"))
    return ask(question, pair[1] if brief else f"The opposite of {pair[0]} is {pair[1]}.", check="exact")


def sequence(rng: Random, brief: bool) -> Exchange:
    """Counting, and what comes before or after."""
    form = rng.randrange(4)
    if form == 0:
        first = number(rng, rng.randint(1, 3))
        last = first + rng.randint(3, 12)
        listed = ", ".join(map(str, range(first, last + 1)))
        return ask(f"Count from {first} to {last}.", listed, f"count {first} {last}", check="numbers")
    if form == 1:
        n = number(rng, rng.randint(1, 3))
        after = rng.random() < 0.5
        result = n + 1 if after else n - 1
        word = "after" if after else "before"
        return ask(f"Which number comes {word} {n}?", str(result) if brief else f"{result} comes {word} {n}.", check="first number")
    names = DAYS if form == 2 else MONTHS
    i = rng.randrange(len(names))
    after = rng.random() < 0.5
    result_name = names[(i + (1 if after else -1)) % len(names)]
    word = "after" if after else "before"
    what = "day" if form == 2 else "month"
    answer = result_name if brief else f"{result_name} comes {word} {names[i]}."
    return ask(f"Which {what} comes {word} {names[i]}?", answer, check="exact")


def number_word(rng: Random, brief: bool) -> Exchange:
    n = rng.randint(0, 10)
    if rng.random() < 0.5:
        return ask(f"Write {n} as a word.", NUMBER_WORDS[n], check="exact")
    return ask(f"Write {NUMBER_WORDS[n]} as a number.", str(n), check="exact")


def repeat(rng: Random, brief: bool) -> Exchange:
    what = rng.choice((lambda: " ".join(rng.sample(WORDS, rng.randint(1, 6))), lambda: first_name(rng), lambda: str(number(rng, rng.randint(1, 6)))))()
    question = rng.choice((f"Repeat after me: {what}", f"Say {what}", f"Say: {what}", f'Repeat "{what}"', f"Say only this: {what}"))
    return ask(question, what, check="exact")


def remember(rng: Random, brief: bool) -> Exchange:
    """A fact about the user, asked for again; other exchanges may come between (see `corpus`)."""
    kinds: tuple[tuple[str, Callable[[Random], str]], ...] = (
        ("name", lambda r: r.choice(FIRST_NAMES)),
        ("favourite colour", lambda r: r.choice(("red", "blue", "green", "yellow", "purple", "orange"))),
        ("city", city),
        ("lucky number", lambda r: str(r.randint(1, 99))),
    )
    what, draw = rng.choice(kinds)
    value = draw(rng)
    told = f"My {what} is {value}." if what != "name" or rng.random() < 0.5 else f"I am {value}."
    said = f"Nice to meet you, {value}!" if what == "name" else f"I will remember that your {what} is {value}."
    answer = value if brief else f"Your {what} is {value}."
    asked = rng.choice((f"What is my {what}?", f"Do you remember my {what}?", f"What was my {what}?"))
    return Exchange((user(told), assistant(said), user(asked), assistant(answer)), (f"{what} {value}",), "exact")


def dialogue(rng: Random) -> str:
    """Small talk as a plain text, for completion without a template."""
    left, right = rng.sample(FIRST_NAMES, 2) if rng.random() < 0.5 else ("User", "Pippin")
    marked = rng.random() < 0.6
    lines = []
    for _ in range(rng.randint(2, 6)):
        questions, answers = rng.choice(_PAIRS)
        question, answer = rng.choice(questions), rng.choice(answers)
        lines += [f"{left}: {question}", f"{right}: {answer}"] if marked else [f"{question} {answer}"]
    return "\n".join(lines)


def notes(rng: Random) -> str:
    """Small facts as running text."""
    country, town = rng.choice(list(CAPITALS.items()))
    facts = [
        f"The capital of {country} is {town}.",
        f"{rng.choice(FIRST_NAMES)} lives in {city(rng)}.",
        "A week has seven days, and a year has twelve months.",
        rng.choice(_PAIRS[-12:])[1][0],
    ]
    rng.shuffle(facts)
    return " ".join(facts)
