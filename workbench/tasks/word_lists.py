"""Words for the pair tasks: common English, written for this purpose; each tokenizer keeps those it has whole."""

from __future__ import annotations

NAMES = tuple(
    """
    Adam Alan Alex Alice Amy Andrew Anna Anne Anthony Ben Brian Bruce Carl Carol Charles Chris Claire Daniel David
    Dean Diana Donald Edward Elizabeth Emily Emma Eric Eva Frank George Grace Greg Hannah Harry Helen Henry Ian Jack
    Jacob James Jane Jason Jean Jennifer Jessica Jim Joe John Joseph Julia Karen Kate Kevin Laura Leo Lisa Louis Lucy
    Luke Maria Mark Martin Mary Matthew Max Michael Michelle Mike Nancy Nick Nicole Oliver Oscar Patrick Paul Peter
    Philip Rachel Ray Rebecca Richard Robert Roger Ruth Ryan Sam Sarah Scott Simon Sophie Stephen Steve Susan Thomas
    Tim Tom Victor Victoria Walter William
    """.split()
)
PLACES = tuple("store garden restaurant school hospital office house station library museum park market church".split())
OBJECTS = tuple("ring book computer drink basket letter bottle ticket ball watch map cup gift hat key".split())

SURFACES = tuple("table desk floor".split())
INTRODUCTIONS = ("there is", "you see", "I see")
THINGS = tuple(
    """
    pencil notebook pen cup plate mug ball bottle envelope bowl book box bag hat key phone lamp spoon fork knife watch
    card coin brush towel candle basket ruler glove scarf clock chair shoe shirt
    """.split()
)
COLOURS = tuple("red orange yellow green blue purple brown black white gray pink".split())

EVENTS = tuple(
    """
    war siege trial strike campaign project journey dispute conflict reign voyage study investigation program marriage
    tour epidemic expedition construction crisis alliance treaty contract revolt festival friendship decline search
    debate process plan quest flood drought famine truce partnership career mission tradition rivalry
    """.split()
)

IDENTIFIERS = tuple(
    """
    data name file value test result line user key path output node url model text version function log field start
    number index error image message size event state row parser end query label action target array code table
    source config status group content client filename command color format order match tag title parent call session
    token server host date mode project info page header option task shape port root buffer batch width height offset
    limit count level option timeout password email address
    """.split()
)
NOUNS = tuple(
    """
    price control cost issue course minute education market water student effect power week country money policy
    health history party reason research moment teacher force office art car music person death sense building trade
    street hour night report view interest ground city river house light weather story island summer garden village
    winter mountain bridge forest kitchen window engine paper letter farmer doctor hospital knowledge army
    """.split()
)

# By what a reader is taken to expect, not by who does the work.
MALE_PROFESSIONS = tuple(
    """
    soldier carpenter mechanic plumber engineer farmer guard captain butcher sailor miner builder driver pilot banker
    architect programmer lawyer surgeon warrior sheriff commander
    """.split()
)
FEMALE_PROFESSIONS = tuple(
    """
    nurse secretary maid dancer librarian teacher housekeeper ballerina receptionist hairdresser babysitter nanny
    therapist singer tutor florist dietitian midwife
    """.split()
)
DOINGS = (
    *("was tired", "left early", "came late", "was happy", "went home", "was angry", "stayed inside", "was worried"),
    *("was famous", "slept well", "was hungry", "took a break"),
)

# Singular and plural.
COUNTED = tuple(
    (singular, f"{singular}s")
    for singular in """
    teacher doctor farmer driver author student king friend artist player lawyer singer manager writer boy girl dog
    cat bird horse car book picture machine house tree river garden letter song engine ship window table guard neighbor
    """.split()
)
VERBS = (
    *(("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"), ("seems", "seem"), ("looks", "look")),
    *(("makes", "make"), ("takes", "take"), ("comes", "come"), ("goes", "go"), ("runs", "run"), ("knows", "know")),
    *(("likes", "like"), ("needs", "need"), ("wants", "want"), ("says", "say"), ("gives", "give"), ("stands", "stand")),
    *(("remains", "remain"), ("appears", "appear"), ("becomes", "become"), ("works", "work")),
)

# Country and capital.
CAPITALS = (
    *(("China", "Beijing"), ("Russia", "Moscow"), ("England", "London"), ("France", "Paris"), ("Japan", "Tokyo")),
    *(("Italy", "Rome"), ("Canada", "Ottawa"), ("Australia", "Canberra"), ("Spain", "Madrid"), ("Egypt", "Cairo")),
    *(("Portugal", "Lisbon"), ("Austria", "Vienna"), ("Greece", "Athens"), ("Thailand", "Bangkok")),
    *(("Germany", "Berlin"), ("Poland", "Warsaw"), ("Ireland", "Dublin"), ("Norway", "Oslo"), ("Sweden", "Stockholm")),
    *(("Denmark", "Copenhagen"), ("Finland", "Helsinki"), ("Hungary", "Budapest"), ("Belgium", "Brussels")),
    *(("Turkey", "Ankara"), ("Iran", "Tehran"), ("Iraq", "Baghdad"), ("Syria", "Damascus"), ("Lebanon", "Beirut")),
    *(("Kenya", "Nairobi"), ("Cuba", "Havana"), ("Peru", "Lima"), ("Chile", "Santiago"), ("Vietnam", "Hanoi")),
    *(("Ukraine", "Kiev"), ("Pakistan", "Islamabad"), ("Afghanistan", "Kabul"), ("Philippines", "Manila")),
)

ANSWER_WORDS = tuple(
    """
    river window garden bridge candle forest letter market mirror mountain silver winter summer copper bottle island
    paper engine castle basket camera doctor farmer museum orange pencil planet rocket school village water stone
    """.split()
)
