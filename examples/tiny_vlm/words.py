"""What pictures are made of: names of colours and shapes, and the words that are printed."""

#: Of things, in RGB. None is near another, jitter included.
COLOURS = {
    "red": (214, 32, 38),
    "green": (30, 140, 48),
    "blue": (32, 70, 205),
    "yellow": (244, 214, 24),
    "orange": (246, 132, 20),
    "purple": (124, 36, 160),
    "pink": (250, 120, 184),
    "brown": (112, 66, 26),
    "black": (18, 18, 20),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
    "black": (16, 16, 16),
    "beige": (240, 226, 196),
    "light blue": (188, 218, 246),
    "light green": (196, 238, 192),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "moon")
#: Never seen together in training.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"), ("blue", "heart"), ("green", "moon"), ("yellow", "square"), ("orange", "cross"),
        ("purple", "circle"), ("pink", "triangle"), ("white", "diamond"),
    }
)  # fmt: skip
SIZES = ("small", "large")
#: By row and column of a grid of three by three.
PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MAX_COUNT = len(NUMBERS) - 1
MAX_NUMBER = 99

WORDS = tuple(
    """
    cat dog sun sky sea tea cup hat car bus map key box bag bed pen ice egg bee cow
    pig fox owl ant arm leg eye ear toy art air oil gas log mud net nut oak pan pot
    rat rod row run sad sit six ten two one yes not now new old hot cold warm cool
    tree leaf rock sand wind rain snow fire wave lake hill road path door wall roof
    room desk lamp book page word song note drum bell ball game team goal race ship
    boat sail fish bird duck frog bear lion wolf deer goat hand foot head face nose
    milk salt rice corn bean soup cake meat food fork bowl dish king lady baby girl
    open shut stop left push pull help home exit west east hello world apple bread
    """.split()  # noqa: SIM905 - a table of words reads better so
)
#: Printed in no training picture.
HELD_OUT_WORDS = ("man", "top", "win", "day", "moon", "star", "farm", "gold", "tank", "south")
