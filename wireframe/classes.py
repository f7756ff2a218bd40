"""Class tables of the two label maps and of the wireframe's edges, and the fusion's class sets.

Names, order and colours are those of the S23DR 2026 data (``hoho2025.color_mappings``); the id of a class is its
position. The tables are repeated here so that fusion needs no optional package; a test holds them equal.
"""

from __future__ import annotations

import functools

import numpy as np

from wireframe.kernels import dispatch, native

# The id in a label map of a pixel whose colour is not in the table.
UNKNOWN = 255

GESTALT_COLORS = {
    "unclassified": (215, 62, 138),
    "apex": (235, 88, 48),
    "eave_end_point": (248, 130, 228),
    "flashing_end_point": (71, 11, 161),
    "ridge": (214, 251, 248),
    "rake": (13, 94, 47),
    "eave": (54, 243, 63),
    "post": (187, 123, 236),
    "ground_line": (136, 206, 14),
    "flashing": (162, 162, 32),
    "step_flashing": (169, 255, 219),
    "hip": (8, 89, 52),
    "valley": (85, 27, 65),
    "roof": (215, 232, 179),
    "door": (110, 52, 23),
    "garage": (50, 233, 171),
    "window": (230, 249, 40),
    "shutter": (122, 4, 233),
    "fascia": (95, 230, 240),
    "soffit": (2, 102, 197),
    "horizontal_siding": (131, 88, 59),
    "vertical_siding": (110, 187, 198),
    "brick": (171, 252, 7),
    "concrete": (32, 47, 246),
    "other_wall": (112, 61, 240),
    "trim": (151, 206, 58),
    "unknown": (127, 127, 127),
    "transition_line": (0, 0, 0),
}

ADE_COLORS = {
    "wall": (120, 120, 120),
    "building;edifice": (180, 120, 120),
    "sky": (6, 230, 230),
    "floor;flooring": (80, 50, 50),
    "tree": (4, 200, 3),
    "ceiling": (120, 120, 80),
    "road;route": (140, 140, 140),
    "bed": (204, 5, 255),
    "windowpane;window": (230, 230, 230),
    "grass": (4, 250, 7),
    "cabinet": (224, 5, 255),
    "sidewalk;pavement": (235, 255, 7),
    "person;individual;someone;somebody;mortal;soul": (150, 5, 61),
    "earth;ground": (120, 120, 70),
    "door;double;door": (8, 255, 51),
    "table": (255, 6, 82),
    "mountain;mount": (143, 255, 140),
    "plant;flora;plant;life": (204, 255, 4),
    "curtain;drape;drapery;mantle;pall": (255, 51, 7),
    "chair": (204, 70, 3),
    "car;auto;automobile;machine;motorcar": (0, 102, 200),
    "water": (61, 230, 250),
    "painting;picture": (255, 6, 51),
    "sofa;couch;lounge": (11, 102, 255),
    "shelf": (255, 7, 71),
    "house": (255, 9, 224),
    "sea": (9, 7, 230),
    "mirror": (220, 220, 220),
    "rug;carpet;carpeting": (255, 9, 92),
    "field": (112, 9, 255),
    "armchair": (8, 255, 214),
    "seat": (7, 255, 224),
    "fence;fencing": (255, 184, 6),
    "desk": (10, 255, 71),
    "rock;stone": (255, 41, 10),
    "wardrobe;closet;press": (7, 255, 255),
    "lamp": (224, 255, 8),
    "bathtub;bathing;tub;bath;tub": (102, 8, 255),
    "railing;rail": (255, 61, 6),
    "cushion": (255, 194, 7),
    "base;pedestal;stand": (255, 122, 8),
    "box": (0, 255, 20),
    "column;pillar": (255, 8, 41),
    "signboard;sign": (255, 5, 153),
    "chest;of;drawers;chest;bureau;dresser": (6, 51, 255),
    "counter": (235, 12, 255),
    "sand": (160, 150, 20),
    "sink": (0, 163, 255),
    "skyscraper": (140, 140, 140),
    "fireplace;hearth;open;fireplace": (250, 10, 15),
    "refrigerator;icebox": (20, 255, 0),
    "grandstand;covered;stand": (31, 255, 0),
    "path": (255, 31, 0),
    "stairs;steps": (255, 224, 0),
    "runway": (153, 255, 0),
    "case;display;case;showcase;vitrine": (0, 0, 255),
    "pool;table;billiard;table;snooker;table": (255, 71, 0),
    "pillow": (0, 235, 255),
    "screen;door;screen": (0, 173, 255),
    "stairway;staircase": (31, 0, 255),
    "river": (11, 200, 200),
    "bridge;span": (255, 82, 0),
    "bookcase": (0, 255, 245),
    "blind;screen": (0, 61, 255),
    "coffee;table;cocktail;table": (0, 255, 112),
    "toilet;can;commode;crapper;pot;potty;stool;throne": (0, 255, 133),
    "flower": (255, 0, 0),
    "book": (255, 163, 0),
    "hill": (255, 102, 0),
    "bench": (194, 255, 0),
    "countertop": (0, 143, 255),
    "stove;kitchen;stove;range;kitchen;range;cooking;stove": (51, 255, 0),
    "palm;palm;tree": (0, 82, 255),
    "kitchen;island": (0, 255, 41),
    "computer;computing;machine;computing;device;data;processor;electronic;computer;information;processing;system": (0, 255, 173),
    "swivel;chair": (10, 0, 255),
    "boat": (173, 255, 0),
    "bar": (0, 255, 153),
    "arcade;machine": (255, 92, 0),
    "hovel;hut;hutch;shack;shanty": (255, 0, 255),
    "bus;autobus;coach;charabanc;double-decker;jitney;motorbus;motorcoach;omnibus;passenger;vehicle": (255, 0, 245),
    "towel": (255, 0, 102),
    "light;light;source": (255, 173, 0),
    "truck;motortruck": (255, 0, 20),
    "tower": (255, 184, 184),
    "chandelier;pendant;pendent": (0, 31, 255),
    "awning;sunshade;sunblind": (0, 255, 61),
    "streetlight;street;lamp": (0, 71, 255),
    "booth;cubicle;stall;kiosk": (255, 0, 204),
    "television;television;receiver;television;set;tv;tv;set;idiot;box;boob;tube;telly;goggle;box": (0, 255, 194),
    "airplane;aeroplane;plane": (0, 255, 82),
    "dirt;track": (0, 10, 255),
    "apparel;wearing;apparel;dress;clothes": (0, 112, 255),
    "pole": (51, 0, 255),
    "land;ground;soil": (0, 194, 255),
    "bannister;banister;balustrade;balusters;handrail": (0, 122, 255),
    "escalator;moving;staircase;moving;stairway": (0, 255, 163),
    "ottoman;pouf;pouffe;puff;hassock": (255, 153, 0),
    "bottle": (0, 255, 10),
    "buffet;counter;sideboard": (255, 112, 0),
    "poster;posting;placard;notice;bill;card": (143, 255, 0),
    "stage": (82, 0, 255),
    "van": (163, 255, 0),
    "ship": (255, 235, 0),
    "fountain": (8, 184, 170),
    "conveyer;belt;conveyor;belt;conveyer;conveyor;transporter": (133, 0, 255),
    "canopy": (0, 255, 92),
    "washer;automatic;washer;washing;machine": (184, 0, 255),
    "plaything;toy": (255, 0, 31),
    "swimming;pool;swimming;bath;natatorium": (0, 184, 255),
    "stool": (0, 214, 255),
    "barrel;cask": (255, 0, 112),
    "basket;handbasket": (92, 255, 0),
    "waterfall;falls": (0, 224, 255),
    "tent;collapsible;shelter": (112, 224, 255),
    "bag": (70, 184, 160),
    "minibike;motorbike": (163, 0, 255),
    "cradle": (153, 0, 255),
    "oven": (71, 255, 0),
    "ball": (255, 0, 163),
    "food;solid;food": (255, 204, 0),
    "step;stair": (255, 0, 143),
    "tank;storage;tank": (0, 255, 235),
    "trade;name;brand;name;brand;marque": (133, 255, 0),
    "microwave;microwave;oven": (255, 0, 235),
    "pot;flowerpot": (245, 0, 255),
    "animal;animate;being;beast;brute;creature;fauna": (255, 0, 122),
    "bicycle;bike;wheel;cycle": (255, 245, 0),
    "lake": (10, 190, 212),
    "dishwasher;dish;washer;dishwashing;machine": (214, 255, 0),
    "screen;silver;screen;projection;screen": (0, 204, 255),
    "blanket;cover": (20, 0, 255),
    "sculpture": (255, 255, 0),
    "hood;exhaust;hood": (0, 153, 255),
    "sconce": (0, 41, 255),
    "vase": (0, 255, 204),
    "traffic;light;traffic;signal;stoplight": (41, 0, 255),
    "tray": (41, 255, 0),
    "ashcan;trash;can;garbage;can;wastebin;ash;bin;ash-bin;ashbin;dustbin;trash;barrel;trash;bin": (173, 0, 255),
    "fan": (0, 245, 255),
    "pier;wharf;wharfage;dock": (71, 0, 255),
    "crt;screen": (122, 0, 255),
    "plate": (0, 255, 184),
    "monitor;monitoring;device": (0, 92, 255),
    "bulletin;board;notice;board": (184, 255, 0),
    "shower": (0, 133, 255),
    "radiator": (255, 214, 0),
    "glass;drinking;glass": (25, 194, 194),
    "clock": (102, 255, 0),
    "flag": (92, 0, 255),
}

EDGE_NAMES = (
    "cornice_return", "cornice_strip", "eave", "flashing", "hip", "rake", "ridge", "step_flashing",
    "transition_line", "valley",
)

GESTALT_NAMES = tuple(GESTALT_COLORS)
ADE_NAMES = tuple(ADE_COLORS)
GESTALT_ID = {name: index for index, name in enumerate(GESTALT_NAMES)}
ADE_ID = {name: index for index, name in enumerate(ADE_NAMES)}
EDGE_ID = {name: index for index, name in enumerate(EDGE_NAMES)}

# Gestalt classes that do not belong to the house.
GESTALT_INVALID = ("unclassified", "unknown", "transition_line")

# ADE classes whose pixels show the house itself: the point gets the gestalt label.
ADE_ENVELOPE = (
    "wall", "building;edifice", "floor;flooring", "ceiling", "windowpane;window", "door;double;door", "house",
    "skyscraper", "screen;door;screen", "blind;screen", "hovel;hut;hutch;shack;shanty", "tower",
    "booth;cubicle;stall;kiosk",
)

# ADE classes that may stand in front of the house and keep their own label.
ADE_OCCLUDERS = (
    "tree", "person;individual;someone;somebody;mortal;soul", "car;auto;automobile;machine;motorcar",
    "truck;motortruck", "van", "fence;fencing", "railing;rail",
    "bannister;banister;balustrade;balusters;handrail", "stairs;steps", "stairway;staircase", "step;stair", "pole",
    "streetlight;street;lamp", "signboard;sign", "awning;sunshade;sunblind", "plant;flora;plant;life",
    "pot;flowerpot",
)

# Priority tiers of a point (0 first); everything else is tier 4.
TIER_GESTALT = (
    ("apex", "eave_end_point", "flashing_end_point"),
    ("rake", "ridge", "eave", "hip", "valley", "flashing", "step_flashing"),
    ("roof",),
    ("door", "garage", "window", "shutter", "fascia", "soffit", "horizontal_siding", "vertical_siding", "brick",
     "concrete", "other_wall", "trim", "post", "ground_line"),
)
TIER_3_ADE = ("building;edifice", "house", "wall", "windowpane;window", "door;double;door")

# class_id of a token: these eleven, then 11 = another part of the house, 12 = everything else.
POINT_CLASSES = (
    "apex", "eave_end_point", "flashing_end_point", "rake", "ridge", "eave", "hip", "valley", "flashing",
    "step_flashing", "roof", "other_house_part", "other",
)


@functools.lru_cache(maxsize=2)
def _colors(table: str) -> np.ndarray:
    """uint8 [C, 3], the colour of each id."""
    colors = GESTALT_COLORS if table == "gestalt" else ADE_COLORS
    return np.array(list(colors.values()), dtype=np.uint8)


@functools.lru_cache(maxsize=2)
def _color_lookup(table: str) -> np.ndarray:
    lookup = np.full(1 << 24, UNKNOWN, dtype=np.uint8)
    for index, (r, g, b) in enumerate(_colors(table).tolist()):
        # Colours that two classes share (skyscraper and road;route) go to the later class.
        lookup[(r << 16) | (g << 8) | b] = index
    return lookup


def colors_to_ids(image: np.ndarray, table: str, *, impl: str = "auto", threads: int = 1) -> np.ndarray:
    """Class ids of a colour-coded label map; ``wireframe.kernels.ops.colors_to_ids`` does the same on tensors.

    Args:
        image: uint8 [..., 3], RGB; read-only and strided arrays will do.
        table: "gestalt" or "ade".
        impl: "auto", "reference" or "native"; all give the same ids.
        threads: of the native implementation.

    Returns:
        uint8 [...]; ``UNKNOWN`` where the colour is not in the table.

    Raises:
        ValueError: an image of another shape or dtype, an unknown ``table`` or ``impl``.
        ImplementationError: an explicit ``impl`` that cannot run.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.shape[-1:] != (3,):
        raise ValueError(f"colors_to_ids: image must be uint8 [..., 3], got {image.dtype} {list(image.shape)}")
    if table not in ("ade", "gestalt"):
        raise ValueError(f"colors_to_ids: table must be 'ade' or 'gestalt', got {table!r}")
    if threads < 1:
        raise ValueError(f"colors_to_ids: threads must be at least 1, got {threads}")
    if dispatch.choose("colors_to_ids", impl) == "reference":
        return colors_to_ids_reference(image, table)
    ids = np.empty(image.shape[:-1], dtype=np.uint8)
    pixels = np.ascontiguousarray(image).reshape(-1, 3)
    native.module().colors_to_ids(pixels, _colors(table), ids.reshape(-1), min(threads, 256))
    return ids


def colors_to_ids_reference(image: np.ndarray, table: str) -> np.ndarray:
    """What ``colors_to_ids`` computes, by a table of all 2^24 colours."""
    packed = image[..., 0].astype(np.uint32)
    packed <<= 8
    packed |= image[..., 1]
    packed <<= 8
    packed |= image[..., 2]
    return np.asarray(_color_lookup(table)[packed])


def ids_to_colors(ids: np.ndarray, table: str) -> np.ndarray:
    """The colour-coded map [H, W, 3] uint8 of class ids [H, W] (all of them in the table)."""
    return _colors(table)[ids]
