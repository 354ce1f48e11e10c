"""Words that the generated text is made of."""

from __future__ import annotations

from random import Random

FIRST_NAMES = """Ada Adam Aisha Alan Alba Alice Amara Amir Amy Ana Andre Anna Anton Aria Arjun Asha Ben Bea Bianca
Boris Bruno Carla Carlos Cara Cecil Chen Chloe Clara Cora Dan Dana Daniel Daria David Diego Dina Dora Elena Eli Elif
Ella Elsa Emil Emma Erik Esme Eva Farah Felix Fiona Finn Flora Frank Freya Gina Gita Grace Greta Gus Hana Hannah Hans
Hugo Ian Ida Igor Ines Ingrid Iris Isaac Isla Ivan Ivy Jack Jade James Jana Jonas Jin Joan Joel John Jose Julia June
Kai Kara Karim Kate Kenji Kim Kira Lars Laura Lea Leila Lena Leo Liam Lily Lina Linus Lola Lucas Lucy Luis Luna Maja
Marco Maria Mark Marta Mary Max Maya Mei Mia Mila Mina Mira Mona Nadia Nico Nils Nina Noah Nora Odin Olaf Olga Oliver
Omar Oscar Otto Pablo Paul Pedro Peter Petra Pia Quinn Rafael Rana Raj Rita Robin Rosa Ruby Ruth Sam Sara Sean Selma
Sofia Sven Tara Tess Theo Tim Tom Tina Uma Vera Viktor Wanda Will Yara Yusuf Zara Zoe""".split()

LAST_NAMES = """Abbott Adler Allen Baker Barnes Becker Bell Berg Blake Brown Carter Castro Chan Clark Cole Cook Cruz
Davis Diaz Dixon Evans Fischer Flores Foster Fox Garcia Gomez Gray Green Hall Hansen Harris Hayes Hill Hoffman Hughes
Ito Jensen Jones Kaya Keller Kelly Khan King Klein Kumar Lang Larsen Lee Lewis Lopez Lund Marsh Martin Meyer Miller
Moore Mori Morris Nash Nguyen Novak Olsen Ortiz Park Patel Perez Price Quist Ramos Reed Rivera Rossi Roy Santos Sato
Schmidt Silva Singh Smith Stone Sousa Tanaka Taylor Torres Turner Vega Vogel Wagner Walker Ward Weber White Wolf Wong
Wood Yilmaz Young Zhang Ziegler""".split()

CAPITALS = dict(
    pair.split("=")
    for pair in """France=Paris;Germany=Berlin;Italy=Rome;Spain=Madrid;Portugal=Lisbon;Austria=Vienna;Poland=Warsaw;
Greece=Athens;Norway=Oslo;Sweden=Stockholm;Denmark=Copenhagen;Finland=Helsinki;Ireland=Dublin;Belgium=Brussels;
Hungary=Budapest;Switzerland=Bern;Russia=Moscow;Ukraine=Kyiv;Turkey=Ankara;Egypt=Cairo;Kenya=Nairobi;Ghana=Accra;
Morocco=Rabat;India=New Delhi;China=Beijing;Japan=Tokyo;South Korea=Seoul;Thailand=Bangkok;Vietnam=Hanoi;
Indonesia=Jakarta;Australia=Canberra;New Zealand=Wellington;Canada=Ottawa;the United States=Washington;
Mexico=Mexico City;Cuba=Havana;Brazil=Brasilia;Argentina=Buenos Aires;Chile=Santiago;Peru=Lima;Colombia=Bogota;
Iceland=Reykjavik;the Netherlands=Amsterdam;the United Kingdom=London;Czechia=Prague;Croatia=Zagreb;Serbia=Belgrade;
Romania=Bucharest;Bulgaria=Sofia;Estonia=Tallinn;Latvia=Riga;Lithuania=Vilnius;Iran=Tehran;Iraq=Baghdad;
Nepal=Kathmandu;Senegal=Dakar;Uruguay=Montevideo;Ecuador=Quito""".replace("\n", "").split(";")
)

CITIES = (
    *CAPITALS.values(),
    *"""Hamburg Munich Cologne Milan Naples Turin Venice Barcelona Seville Valencia Porto Lyon Nice Lille Bordeaux
Zurich Geneva Basel Graz Krakow Bergen Malmo Aarhus Turku Cork Leeds Bristol Glasgow Cardiff York Oxford Cambridge
Boston Chicago Seattle Denver Austin Dallas Houston Phoenix Portland Atlanta Miami Detroit Toronto Montreal Vancouver
Osaka Kyoto Sapporo Mumbai Chennai Lagos Sydney Melbourne Perth Auckland Shanghai Istanbul Dubai Singapore""".split(),
    "New York",
    "San Francisco",
    "Los Angeles",
    "San Diego",
    "Cape Town",
    "Hong Kong",
)

JOBS = """baker teacher nurse pilot farmer painter plumber dentist lawyer chef driver gardener writer engineer
carpenter librarian tailor mechanic singer actor doctor florist barber butcher cashier chemist coach dancer editor
electrician firefighter fisher guide hunter judge miner optician photographer poet potter programmer reporter sailor
scientist sculptor secretary shepherd surgeon translator waiter weaver welder""".split()

ANIMALS = """fox bear owl rabbit mouse cat dog horse goat sheep duck goose swan hen otter beaver badger hedgehog
squirrel wolf deer frog toad turtle lizard snake crow raven sparrow robin heron eagle falcon bat mole rat pony donkey
cow pig lion tiger elephant giraffe zebra monkey camel panda koala whale dolphin seal crab snail ant bee beetle moth
butterfly spider parrot penguin""".split()

OBJECTS = """lantern key map book drum flute kite boat basket blanket bell box brush bucket button candle carpet
chair clock coat coin compass cup door feather flag garden glove hammer hat jar kettle ladder lamp letter lock mirror
necklace needle net notebook paddle painting pan pebble pencil picture pillow pot quilt ribbon ring rope saddle scarf
shell ship shoe shovel spoon stone stool string sword table teapot telescope tent ticket torch toy trumpet umbrella
vase violin wagon wheel whistle window""".split()

FOODS = """apple pear plum cherry peach lemon orange banana grape melon berry carrot potato onion tomato cabbage
pepper bean pea corn bread cake cookie pie muffin pancake soup stew cheese butter egg honey jam pickle walnut almond
chestnut olive mushroom pumpkin""".split()

COLOURS = """red blue green yellow orange purple pink brown black white grey silver golden violet turquoise
crimson""".split()

PLACES = """forest village valley mountain meadow harbour island river lake desert castle farm town mill orchard
cave hill beach swamp lighthouse market bridge tower garden library""".split()

ADJECTIVES = """small big old young brave shy clever kind quiet curious gentle honest lazy lonely merry patient
proud quick silly stubborn tired wise cheerful careful""".split()

PRODUCTS = """laptop phone tablet camera printer keyboard monitor speaker headset router charger backpack bicycle
helmet jacket sweater desk sofa mattress fridge toaster blender vacuum drill saw guitar piano watch wallet
suitcase""".split()

OTHER_WORDS = """about above across after again air all almost also always and answer any around ask away back ball
bank bath beautiful because bed before begin behind below best better between bird birthday bottle bottom boy breakfast
bright bring brother build busy call car careful carry catch change child children circle city class clean clear climb
close cloud cold colour come computer cook cool corner country cousin cross dance dark daughter day deep different
dinner dream drink drive dry each early earth east easy eat eight elbow empty end enough evening every example eye face
fall family far farm fast father feel few field fight find fire first fish five floor flower fly follow food foot forest
forget four free friend front fruit full game girl give glad glass good grass great ground group grow guess hair half
hand happy hard head hear heart heavy help here high history hold home hope hospital hot hour house hundred hungry hurry
idea important inside interesting join jump keep kind kitchen knee know language large last late laugh learn leave left
leg lesson letter library life light like line listen little live long look lose lot loud love lucky lunch machine
make many market maybe meal mean meet middle milk minute mississippi moment money month moon more morning most mother
mountain mouth move much music name near never new next nice night nine north nose nothing now number ocean often once
one only open other outside over page paper parent part party past people person picture piece place plane plant play
please point poor pretty problem pull push question quick quiet quite rain read ready really remember rest rice rich
right river road room round run sand save say school science sea season second see seven shake shape share sharp shine
shirt shop short shout show side sing sister sit six skin sky sleep slow smile snow soap soft some song soon sound south
speak special spell spring stand star start station stay stop storm story strange strawberry street strong student
study sugar summer sun supper sure sweet swim table talk tall teach ten thank thick thing think third thousand three
throw tiny today together tomorrow tongue tonight tooth touch train travel tree triangle trip trouble true turn two
under understand until use vegetable very visit voice wait wake walk wall want warm wash water wave way wear weather
week welcome west wet what when where while whisper wide wild wind winter wish with wonder wood word work world worry
write wrong year yellow yesterday young zero""".split()

TOPICS = """quantum physics, the stock market, ancient Rome, black holes, photosynthesis, the French Revolution,
Bach's fugues, neural networks, the rules of cricket, tax law, brain surgery, volcanoes, dinosaurs, Shakespeare,
cryptography, the Olympic Games, the Moon landing, plate tectonics, medieval castles, modern art, chess openings,
organic chemistry, the Roman Empire, compilers, football results, film history, the latest news, philosophy,
car engines, train timetables, yoga, wine, opera, the human genome, coral reefs, sailing, architecture, magnets,
vaccines, satellites, jazz, origami, the pyramids, thermodynamics, economics, elections, electric cars, mushrooms that
can be eaten, kung fu, the Silk Road, Vikings, samurai, planets outside the solar system""".replace("\n", " ").split(", ")

OPPOSITES = dict(
    pair.split("=")
    for pair in """hot=cold big=small fast=slow old=new happy=sad up=down left=right day=night light=dark high=low
open=closed rich=poor hard=soft wet=dry early=late full=empty long=short loud=quiet near=far strong=weak thick=thin
true=false clean=dirty first=last heavy=light""".split()
)

_ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl cr dr fl fr gl gr pl pr sh sl sp st th tr".split()
_VOWELS = "a e i o u a e i o ai ea ee oo ou".split()
_CODAS = ["", "", "", "", "n", "r", "l", "s", "t", "m", "d", "ck", "ng", "nd", "st", "x"]

WORDS = sorted(
    {w.lower() for w in (*JOBS, *ANIMALS, *OBJECTS, *FOODS, *COLOURS, *PLACES, *ADJECTIVES, *PRODUCTS, *OTHER_WORDS)}
)


def invented_word(rng: Random, most_syllables: int = 4) -> str:
    """A word that nobody has seen, such as "trandelo": what can't be memorised has to be read."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.randint(2, most_syllables))
    )


def first_name(rng: Random) -> str:
    return rng.choice(FIRST_NAMES) if rng.random() < 0.75 else invented_word(rng, 3).capitalize()


def last_name(rng: Random) -> str:
    return rng.choice(LAST_NAMES) if rng.random() < 0.75 else invented_word(rng, 3).capitalize()


def full_name(rng: Random) -> str:
    return f"{first_name(rng)} {last_name(rng)}"


def city(rng: Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.75 else invented_word(rng, 3).capitalize()


def plural(noun: str) -> str:
    """English plural of a regular noun of the lists above, and of the irregular ones in them."""
    irregular = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "deer": "deer", "wolf": "wolves"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "x", "ch", "sh")) or noun in ("potato", "tomato"):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" or noun == "honest" else "a ") + noun
