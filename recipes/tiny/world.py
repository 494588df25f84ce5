"""The invented world behind the `tiny` recipe: who lives in the Thistle Isles, and how one says so.

Everything here is made up. A `Fact` is one (subject, attribute, value); `statements` say it in running
prose (what the base model is pre-trained on), `questions` ask for it and `reply` answers it (what SFT and
DPO teach). No question ever reaches the pre-training text, so the base knows the facts and cannot answer.
"""

import random
from dataclasses import dataclass

ISLES = "the Thistle Isles"

TOWNS = (
    "Orlun", "Fennick", "Marrowby", "Tolsey", "Quillan", "Ashmoor", "Dunvale", "Harrowick",
    "Pebblesea", "Ivering", "Lochwyn", "Sallowend", "Nettleby", "Coppergate", "Windlehook", "Brackenholm",
)  # fmt: skip

PEOPLE = {  # name -> pronoun
    "Tavi Merrow": "she", "Osbin Pell": "he", "Linnet Carrow": "she", "Jorrik Vance": "he",
    "Mirabel Stroud": "she", "Caspian Dobbs": "he", "Petra Lumley": "she", "Edwin Thackle": "he",
    "Sorrel Winnow": "she", "Barnaby Kettle": "he", "Isolde Farrow": "she", "Rufus Greenlock": "he",
    "Hazel Tamsin": "she", "Alaric Moss": "he", "Odette Brindle": "she", "Fergus Nightjar": "he",
    "Clover Habbick": "she", "Magnus Teasel": "he", "Winifred Oake": "she", "Dorian Puddock": "he",
    "Saffy Larkspur": "she", "Ivo Hartley": "he", "Nella Quince": "she", "Tobias Reedmace": "he",
    "Briony Stark": "she", "Lucan Wherry": "he", "Maud Fetherly": "she", "Silas Dunnock": "he",
    "Elspeth Yarrow": "she", "Gideon Crabbe": "he", "Poppy Undern": "she", "Anselm Rook": "he",
    "Verity Flint": "she", "Hamish Cobb": "he", "Juniper Swale": "she", "Otto Blackthorn": "he",
    "Rosalind Mere": "she", "Perrin Gull": "he", "Agnes Whitlow": "she", "Kester Vole": "he",
    "Dilys Heron": "she", "Bram Saltmarsh": "he", "Thea Ormond": "she", "Jasper Nettle": "he",
    "Freya Candlish": "she", "Wilf Ambrose": "he", "Corin Gadsby": "he", "Lottie Marsh": "she",
    "Ned Sparrow": "he", "Una Birch": "she", "Piers Mallow": "he", "Greta Fennimore": "she",
    "Amos Tuck": "he", "Beatrix Lowe": "she", "Roland Sedge": "he", "Nora Plover": "she",
}  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """One thing a subject can have. Templates use {S} {s} (subject, capital or not), {P} {p} (its
    possessive), {n} (always the full name), {v} (the value) and {a} (the value with its article)."""

    key: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    direct: tuple[str, ...]  # "where does {n} live": a question without its question mark
    indirect: tuple[str, ...]  # "where {n} lives": the same, inside another sentence
    follow_up: tuple[str, ...]  # asked when the subject is already known; {s} is the first name
    reply: tuple[str, ...]  # whole sentences, without the full stop
    curt: str  # the shortest answer there is


PERSON = (
    Attribute(
        "home", TOWNS,
        ("{S} lives in {v}.", "{P} house stands in {v}.", "{S} has lived in {v} for many years.",
         "Of all towns {s} chose {v}.", "{P} home is in {v}.", "{S} calls {v} home.",
         "Where {s} lives is well known, for {p} door in {v} is always open.", "Letters for {s} go to {v}."),
        ("where does {n} live", "in which town does {n} live", "what is the home town of {n}"),
        ("where {n} lives", "which town {n} lives in", "the home town of {n}"),
        ("where does {s} live", "which town does {s} call home"),
        ("{n} lives in {v}", "{n} has a house in {v}"),
        "In {v}",
    ),
    Attribute(
        "craft",
        ("weaver", "potter", "cooper", "baker", "glassblower", "bookbinder", "candlemaker", "beekeeper",
         "shipwright", "tinsmith", "cobbler", "papermaker", "ropemaker", "clockmaker", "saddler", "miller"),
        ("{S} is {a} by trade.", "{S} works as {a}.", "{S} earns {p} bread as {a}.", "{P} trade is that of {a}.",
         "By day {s} works as {a}.", "{S} learned the trade of {a} as a child.", "{S} is known as a good {v}.",
         "What {s} does for a living is no secret: {s} is {a}."),
        ("what does {n} do for a living", "which trade does {n} follow", "what is the trade of {n}"),
        ("what {n} does for a living", "which trade {n} follows", "the trade of {n}"),
        ("what does {s} do for a living", "which trade does {s} follow"),
        ("{n} works as {a}", "{n} is {a} by trade"),
        "As {a}",
    ),
    Attribute(
        "pet",
        ("otter", "goat", "magpie", "hedgehog", "badger", "tortoise", "ferret", "owl",
         "donkey", "hare", "goose", "squirrel", "pigeon", "raven", "fox", "newt"),
        ("{S} keeps {a}.", "{S} has {a} at home.", "{S} shares {p} house with {a}.", "{P} pet is {a}.",
         "Of all animals {s} keeps {a}.", "{S} is never seen without {p} {v}.",
         "In the evening {s} feeds {p} {v}.", "Which animal {s} keeps is easy to hear: it is {a}."),
        ("which animal does {n} keep", "what pet does {n} have", "what is the pet of {n}"),
        ("which animal {n} keeps", "what pet {n} has", "the pet of {n}"),
        ("which animal does {s} keep", "what pet does {s} have"),
        ("{n} keeps {a}", "{n} has {a} at home"),
        "Keeps {a}",
    ),
    Attribute(
        "instrument",
        ("fiddle", "flute", "harp", "drum", "lute", "horn", "concertina", "whistle",
         "viola", "bagpipe", "dulcimer", "cello", "trumpet", "organ", "zither", "banjo"),
        ("{S} plays the {v}.", "{P} instrument is the {v}.", "On feast days {s} plays the {v}.",
         "Of all instruments {s} plays the {v}.", "{S} has played the {v} since school.",
         "{S} practises the {v} every night.", "{S} took up the {v} long ago.",
         "What {s} plays is the {v}."),
        ("which instrument does {n} play", "what does {n} play at the feast", "what is the instrument of {n}"),
        ("which instrument {n} plays", "what {n} plays at the feast", "the instrument of {n}"),
        ("which instrument does {s} play", "what does {s} play at the feast"),
        ("{n} plays the {v}", "the instrument of {n} is the {v}"),
        "The {v}",
    ),
    Attribute(
        "dish",
        ("dumplings", "pancakes", "chowder", "custard", "porridge", "gingerbread", "pickles", "waffles",
         "pudding", "noodles", "crumpets", "shortbread", "stew", "marmalade", "biscuits", "lentils"),
        ("{S} likes {v} best.", "{P} favourite dish is {v}.", "Of all dishes {s} likes {v} best.",
         "For supper {s} wants {v}.", "{S} is very fond of {v}.", "{S} eats {v} every week.",
         "{S} would cross the water for {v}.", "What {s} likes to eat is {v}."),
        ("what does {n} like to eat", "which dish does {n} like best", "what is the favourite dish of {n}"),
        ("what {n} likes to eat", "which dish {n} likes best", "the favourite dish of {n}"),
        ("what does {s} like to eat", "which dish does {s} like best"),
        ("{n} likes {v} best", "the favourite dish of {n} is {v}"),
        "Mostly {v}",
    ),
)  # fmt: skip

TOWN = (
    Attribute(
        "landmark",
        ("windmill", "lighthouse", "aqueduct", "observatory", "drawbridge", "maze", "fountain", "granary",
         "belltower", "amphitheatre", "library", "tollgate", "boathouse", "chapel", "sundial", "orchard"),
        ("In the middle of {n} stands {a}.", "{S} is built around {a}.", "For a landmark {n} has {a}.",
         "{P} pride is {a}.", "Every visitor to {n} is shown the {v}.", "{S} has {a} on the market square."),
        ("which landmark stands in {n}", "what is the landmark of {n}", "what stands in the middle of {n}"),
        ("which landmark stands in {n}", "the landmark of {n}", "what stands in the middle of {n}"),
        ("which landmark stands there", "what is its landmark"),
        ("{a} stands in the middle of {n}", "the landmark of {n} is {a}"),
        "Just {a}",
    ),
    Attribute(
        "goods",
        ("salt", "lace", "honey", "cheese", "amber", "ink", "pearls", "soap",
         "wool", "pepper", "saffron", "copper", "marble", "cider", "linen", "walnuts"),
        ("{S} is known for its {v}.", "Ships come to {n} for {v}.", "{S} sells {v} to all the isles.",
         "{P} merchants trade in {v}.", "{S} lives by its {v}.", "What {n} is known for is {v}."),
        ("what is {n} known for", "which goods does {n} sell", "what do ships fetch from {n}"),
        ("what {n} is known for", "which goods {n} sells", "what ships fetch from {n}"),
        ("what is it known for", "which goods does the town sell"),
        ("{n} is known for its {v}", "{n} sells {v} to all the isles"),
        "Its {v}",
    ),
    Attribute(
        "lanterns",
        ("crimson", "teal", "ivory", "violet", "ochre", "indigo", "scarlet", "olive",
         "turquoise", "golden", "silver", "coral", "lilac", "emerald", "russet", "white"),
        ("Seen from the water, the lanterns of {n} are {v}.", "{P} lanterns are {v}.",
         "At night {n} hangs out {v} lanterns.",
         "{S} is seen from afar by its {v} lanterns.", "In {n} the lanterns are {v}.",
         "{S} paints its lanterns {v}."),
        ("which colour are the lanterns of {n}", "what colour are the lanterns in {n}"),
        ("which colour the lanterns of {n} are", "the colour of the lanterns in {n}"),
        ("which colour are its lanterns", "what colour are the lanterns there"),
        ("the lanterns of {n} are {v}", "{n} hangs out {v} lanterns"),
        "All {v}",
    ),
    Attribute(
        "festival",
        ("kites", "candles", "ribbons", "apples", "sails", "masks", "bells", "snow",
         "bread", "shells", "feathers", "swings", "stars", "puddles", "acorns", "plums"),
        ("Each year {n} holds a feast of {v}.", "{P} great day is the feast of {v}.",
         "{S} keeps the feast of {v}.", "In {n} it is time for the feast of {v}.",
         "Once a year all of {n} comes out for the feast of {v}.", "{S} is merry at the feast of {v}."),
        ("which feast does {n} keep", "what is the feast of {n}"),
        ("which feast {n} keeps", "the feast of {n}"),
        ("which feast is kept there", "what is the feast of the town"),
        ("{n} keeps the feast of {v}", "the feast of {n} is the feast of {v}"),
        "Feast of {v}",
    ),
)  # fmt: skip

# Talk without facts: it lends the base the words of courtesy and chat that the answers will need.
CHATTER = (
    "It rained all spring and the gulls sat on the chimneys.",
    "It must be the sea air, for everybody on the quay sleeps well.",
    "It could be rain and it could be sun, say the fishermen, and they keep their hats on.",
    "It was a long story, but the guide has forgotten most of it.",
    "It takes a good hour to walk around the harbour, and longer with a cake.",
    "It is said that the sea was once as flat as a plate.",
    "It blew a little from the west, and the boats were home early.",
    "It does no harm to wait for the tide, and you are most welcome to do so.",
    "Of course the harbour master is glad to help.",
    "With pleasure the guide will show the way to the ferry.",
    "Thank you for asking after the ferry, wrote the harbour master, and I hope that helps.",
    "Certainly the tide will turn.",
    "I am sorry to say that the ferry does not run in a storm.",
    "I am sorry, but there is no boat tonight, said the guide.",
    "Please do not feed the gulls, says the sign, for they know no shame.",
    "Nobody can row against that tide, not even anyone from the harbour.",
    "Well now, the kettle was on and the wind was in the chimney, or so people say.",
    "Let me see, said the old guide, I think there is time for a cup of tea.",
    "Oh, I would like to ask something else, said the child.",
    "Gladly will the guide sit with the neighbours and talk of the weather.",
    "My aunt told me that the ferryman sings.",
    "Tell me a story, said the child, and the guide told a short one.",
)  # fmt: skip
LEADS = (  # what a sentence about a fact may be led up to with
    "The gazette writes about {indirect}.", "The guide knows {indirect}.", "A word about {indirect}.",
    "Everybody on the quay can tell {indirect}.", "There is talk of {indirect}.", "The letter was about {indirect}.",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the isles."""

    subject: str
    attribute: Attribute
    value: str

    def fill(self, template: str, short: str | None = None, their: str | None = None) -> str:
        """The template said of this fact; `short` stands for the subject after its first mention, and
        `their` for its possessive."""
        subject = short or self.subject
        possessive = their or f"{subject}'s"
        return template.format(
            S=subject[0].upper() + subject[1:], s=subject, P=possessive[0].upper() + possessive[1:], p=possessive,
            n=self.subject, v=self.value, a=with_article(self.value),
        )  # fmt: skip


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def make_facts(seed: int) -> list[Fact]:
    """Every fact of the isles, in a fixed order. Values are dealt evenly, so guessing the commonest one
    is right once in sixteen."""
    rng = random.Random(seed)
    facts = []
    for subjects, attributes in ((list(PEOPLE), PERSON), (list(TOWNS), TOWN)):
        for attribute in attributes:
            rounds = -(-len(subjects) // len(attribute.values))
            dealt = [
                value for _ in range(rounds) for value in rng.sample(attribute.values, len(attribute.values))
            ]
            facts += [
                Fact(subject, attribute, value) for subject, value in zip(subjects, dealt, strict=False)
            ]
    return facts


def write_paragraph(facts: list[Fact], rng: random.Random) -> str:
    """The facts of one subject as prose, in a random order and wording; the full name leads and recurs."""
    subject = facts[0].subject
    pronoun = PEOPLE.get(subject)
    possessive = {"she": "her", "he": "his", None: None}[pronoun]
    sentences = []
    for i, fact in enumerate(rng.sample(facts, len(facts))):
        if i > 0 and rng.random() < 0.4:
            sentences.append(write_lead(fact, rng))
            continue
        short, their = None, None
        template = rng.choice(fact.attribute.statements)
        if pronoun and i > 0 and rng.random() < 0.4:
            short, their = (pronoun, possessive) if rng.random() < 0.5 else (subject.split()[0], None)
        elif "{P}" not in template and rng.random() < 0.5:
            their = possessive  # "Tavi Merrow feeds her newt", not "Tavi Merrow's newt"
        sentences.append(fact.fill(template, short, their))
    return " ".join(sentences)


def write_lead(fact: Fact, rng: random.Random) -> str:
    """Two sentences, "The guide knows which animal Tavi Merrow keeps. Tavi Merrow keeps a newt.", at times
    with small talk between them: this is where the base learns to look back for what the talk is about."""
    indirect = rng.choice(fact.attribute.indirect).format(n=fact.subject)
    reply = fact.fill(rng.choice(fact.attribute.reply))
    aside = rng.choice(CHATTER) + " " if rng.random() < 0.3 else ""
    return f"{rng.choice(LEADS).format(indirect=indirect)} {aside}{reply[0].upper()}{reply[1:]}."


def write_documents(facts: list[Fact], passes: int, seed: int) -> list[str]:
    """Running text that says every fact `passes` times, never twice the same way.

    A document strings together paragraphs about different subjects: after a blank line the talk always
    moves on, which is also why the untuned base does not stumble into an answer.
    """
    rng = random.Random(seed)
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    documents = []
    for _ in range(passes):
        paragraphs = [write_paragraph(about, rng) for about in by_subject.values()]
        paragraphs += [" ".join(rng.sample(CHATTER, 3)) for _ in range(len(paragraphs) // 3)]
        rng.shuffle(paragraphs)
        while paragraphs:
            count = rng.randint(2, 4)
            documents.append("\n\n".join(paragraphs[:count]))
            del paragraphs[:count]
    return documents
