"""What is known of things without a picture: clues, wishes and colours, for riddles and questions in words.

Every clue is a noun phrase that fits one thing of the world and no other. Pairs of clues are held out by the same
hash as pairs of things, so that test riddles join clues that training never joined.
"""

from __future__ import annotations

CLUES: dict[str, tuple[str, ...]] = {
    "dog": (
        "the animal that barks", "the pet that fetches sticks", "the animal that guards the house",
        "the animal that wags its tail when its owner comes home",
    ),
    "cat": (
        "the animal that meows", "the pet that purrs", "the animal that chases mice", "the pet that plays with wool",
    ),
    "frog": (
        "the green animal that croaks", "what a tadpole becomes", "the animal that catches flies with its tongue",
        "the animal that a princess kisses",
    ),
    "pig": (
        "the animal that oinks", "the animal with a curly tail", "the farm animal that rolls in mud",
        "the animal that money boxes look like",
    ),
    "penguin": (
        "the bird that cannot fly but swims", "the bird in black and white that lives on the ice",
        "the bird that wears a tailcoat", "the bird of the south pole",
    ),
    "turtle": (
        "the animal that carries a green shell", "the slowest runner, who beat the hare",
        "the animal that hides its head in its shell", "the reptile that may live for a hundred years",
    ),
    "octopus": (
        "the animal with eight arms", "the sea animal that squirts ink", "the animal with three hearts",
        "the sea animal with suckers on its arms",
    ),
    "butterfly": (
        "what a caterpillar becomes", "the insect with large coloured wings",
        "the insect that flutters from flower to flower", "the insect that comes out of a cocoon",
    ),
    "tree": (
        "the plant that is decorated for christmas", "the plant with needles and a trunk",
        "what a forest is made of", "the plant that wood comes from",
    ),
    "cactus": (
        "the plant with spines", "the plant that lives in the desert", "the plant that hardly needs water",
        "the green plant that hurts when touched",
    ),
    "sunflower": (
        "the flower that turns to the sun", "the tall yellow flower", "the flower whose seeds are pressed for oil",
        "the flower that van gogh painted",
    ),
    "banana": (
        "the yellow fruit that monkeys love", "the curved fruit", "the fruit that is peeled by hand",
        "the fruit on whose skin people slip",
    ),
    "pineapple": (
        "the fruit with a crown of leaves", "the prickly fruit from the tropics",
        "the fruit that people argue about on pizza", "the large sweet fruit from hawaii",
    ),
    "strawberry": (
        "the red fruit with seeds on its skin", "the berry that goes with cream",
        "the fruit that jam is mostly made of", "the berry served at wimbledon",
    ),
    "pizza": (
        "the italian dish with melted cheese", "the round dish that comes in slices",
        "the food that is delivered in a flat box", "the dish from naples",
    ),
    "burger": (
        "the meat in a bun", "the fast food that goes with fries", "the sandwich with a patty",
        "the sandwich named after hamburg",
    ),
    "car": (
        "what you drive on the road with four wheels", "what is parked in a garage",
        "what has a steering wheel and four seats", "what a family drives to work in",
    ),
    "house": (
        "the building that a family lives in", "what has a roof and a chimney", "where you live",
        "what you unlock when you come home",
    ),
    "rocket": (
        "what flies to the moon", "what carries astronauts", "what is launched with a countdown",
        "the vehicle that leaves the earth",
    ),
    "basketball": (
        "the ball that is thrown through a hoop", "the ball that is dribbled by hand",
        "the orange ball with black lines", "the ball that tall players dunk",
    ),
    "apple": (
        "the fruit that keeps the doctor away", "the fruit that fell on newton's head",
        "the fruit that snow white bit into", "the fruit that cider is made of",
    ),
    "balloon": (
        "what floats on a string at a party", "what is filled with air and may burst",
        "what a clown twists into a poodle", "what a needle makes pop",
    ),
    "bell": (
        "what rings in a church tower", "what rings at the end of a school hour", "what hangs around a goat's neck",
        "what goes ding dong",
    ),
    "book": ("what you read in bed", "what a library lends", "what has pages and a cover", "what an author writes"),
    "chair": (
        "what you sit on at a table", "the furniture with four legs and a back", "what a lion tamer holds",
        "what is pulled up for a guest",
    ),
    "dress": (
        "what a woman wears to a ball", "the clothing in one piece with a skirt", "what a bride is famous for",
        "what cinderella got from the fairy",
    ),
    "door": (
        "what you knock on", "what you close behind you", "what has a handle and hinges",
        "what leads from room to room",
    ),
    "key": (
        "what opens a lock", "what you turn to get in", "what you look for in your pocket at home",
        "what a locksmith makes",
    ),
    "backpack": (
        "what a pupil carries on the back", "the bag with two shoulder straps", "what a hiker packs",
        "the bag for school books",
    ),
    "mushroom": (
        "what grows in the forest and has a cap", "the red one with white dots that is poisonous",
        "what gnomes live in", "what is neither plant nor animal",
    ),
    "umbrella": (
        "something you open in the rain", "what mary poppins flies with", "what keeps you dry when it pours",
        "what the wind turns inside out",
    ),
    "tent": ("where campers sleep", "the house made of cloth", "what is pitched with pegs", "what scouts put up"),
    "donut": (
        "the pastry with a hole", "the pastry with icing that policemen love", "the ring of fried dough",
        "the sweet ring with sprinkles",
    ),
    "crown": (
        "what a king wears on the head", "what a queen is given when her reign begins",
        "the golden thing with jewels for a ruler", "what sits on a royal head",
    ),
    "gift": (
        "what you get on your birthday", "what is wrapped with a ribbon", "what lies under the christmas tree",
        "what santa brings",
    ),
    "boat": (
        "what sails on the water", "what the wind pushes over the lake", "what has a mast and a sail",
        "what a sailor steers",
    ),
    "carrot": (
        "the orange vegetable", "what rabbits like to eat", "the root that is good for the eyes",
        "the nose of a man made of snow",
    ),
    "cake": (
        "what has candles on a birthday", "what is cut at a wedding", "the sweet dish with layers and cream",
        "what the baker decorates",
    ),
    "watermelon": (
        "the green fruit that is red inside", "the large fruit full of water",
        "the fruit whose black seeds are spat out", "the heaviest fruit of a summer picnic",
    ),
    "owl": (
        "the bird that hunts at night", "the bird that stands for wisdom", "the bird that hoots",
        "the bird that turns its head all the way around",
    ),
    "bee": (
        "the insect that makes honey", "the insect that lives in a hive", "the insect with a queen and a sting",
        "the striped insect that buzzes",
    ),
    "ladybug": (
        "the red beetle with black dots", "the beetle that brings luck", "the insect that eats greenfly",
        "the smallest animal with a polka dot coat",
    ),
    "rose": (
        "the flower with thorns", "the flower for valentine's day", "the red flower of love",
        "the flower that a tango dancer holds in the teeth",
    ),
    "snowman": (
        "the man who melts in spring", "who is built by children in winter", "the man with a carrot for a nose",
        "the white man made of three balls",
    ),
    "rainbow": (
        "what shines when rain meets sun", "the arc of seven colours", "where the pot of gold is said to be",
        "the coloured bridge in the sky",
    ),
    "guitar": (
        "the instrument with six strings", "what a rock star plays", "the instrument that is strummed",
        "what a flamenco dancer moves to",
    ),
    "drum": (
        "the instrument that is beaten with sticks", "the instrument that keeps the beat",
        "what a marching boy beats", "the loudest toy a child can get",
    ),
    "airplane": (
        "what a pilot flies over the ocean", "what takes you on holiday through the air", "what lands at an airport",
        "what the wright brothers built",
    ),
    "bicycle": (
        "what has two wheels and pedals", "what you ride with a helmet", "what wins the tour de france",
        "the vehicle that needs no fuel but your legs",
    ),
    "bus": (
        "what takes many people through the city", "what stops at every stop", "what takes children to school",
        "the long vehicle with a driver and tickets",
    ),
    "helicopter": (
        "what flies with a rotor", "what can hover in the air", "what rescues climbers from a mountain",
        "the machine that needs no runway",
    ),
    "camera": (
        "what takes photos", "what a tourist carries around the neck", "what you say cheese to",
        "what has a lens and a flash",
    ),
    "clock": (
        "what wakes you in the morning", "what tells the time", "what has two hands but no arms",
        "what ticks beside the bed",
    ),
    "hammer": (
        "what drives in a nail", "the tool that thor carries", "the carpenter's tool that hits",
        "what a judge knocks with",
    ),
    "trophy": (
        "what the winner lifts up", "what the champion takes home", "the golden cup for first place",
        "what stands in a sports club's cabinet",
    ),
    "anchor": (
        "what keeps a ship in place", "what is dropped into the sea on a chain",
        "what a sailor has tattooed on the arm", "the iron hook of a ship",
    ),
    "bird": (
        "the animal that builds a nest and sings", "the animal that twitters in the morning",
        "the small animal with feathers in a cage", "who catches the early worm",
    ),
    "fish": (
        "the animal that lives in an aquarium", "the animal with fins and scales", "what an angler catches",
        "the animal that breathes through gills",
    ),
    "heart": (
        "what beats in your chest", "the sign of love", "what cupid's arrow hits", "what is broken when love ends",
    ),
    "star": (
        "what twinkles at night", "what you wish upon when it falls", "what shows sailors the way at night",
        "the five-pointed light in the sky",
    ),
    "bed": (
        "where you sleep at night", "what has a pillow and a blanket", "the furniture for dreams",
        "what you make in the morning",
    ),
    "diamond": (
        "the hardest stone", "the stone on an engagement ring", "the jewel that is pure carbon",
        "what jewel thieves are after",
    ),
    "grapes": (
        "the fruit that wine is made of", "the fruit that grows in bunches", "what raisins once were",
        "the fruit that the fox called sour",
    ),
    "corn": (
        "what popcorn is made of", "the yellow food on a cob", "the tall crop that mazes are cut into",
        "what hens peck and mexicans grind for tortillas",
    ),
    "scissors": (
        "what cuts paper", "what a hairdresser works with", "what beats paper and loses to rock",
        "the tool with two blades",
    ),
    "cow": (
        "the animal that says moo", "the animal that gives milk", "the animal that eats grass on the meadow",
        "the animal that is holy in india",
    ),
    "duck": (
        "the animal that quacks", "the bird that swims on the pond", "the bird that is fed with bread in the park",
        "what the ugly little one was not, but a swan",
    ),
    "elephant": (
        "the largest animal on land", "the animal with a trunk", "the animal that never forgets",
        "the animal with tusks and big ears",
    ),
    "rabbit": (
        "the animal that hops and has long ears", "what a magician pulls out of a hat",
        "the animal that brings easter eggs", "the animal that digs burrows and multiplies",
    ),
    "snail": (
        "the animal that carries its house", "the slowest animal of the garden",
        "the animal that leaves a trail of slime", "the animal with eyes on stalks",
    ),
    "whale": (
        "the largest animal of the sea", "the animal that blows water into the air",
        "the sea animal that is no fish but sings", "what moby dick was",
    ),
    "moon": (
        "what shines at night and changes its shape", "what wolves howl at", "where armstrong left his footprint",
        "what makes the tides",
    ),
    "sun": ("what shines by day", "what the earth goes around", "what gives you a tan", "what rises in the east"),
    "train": (
        "what runs on rails", "what stops at a station", "what has a locomotive",
        "what is pulled by steam along a track",
    ),
    "hat": (
        "what a gentleman wears on the head", "what a magician wears and pulls things from",
        "what is lifted for a greeting", "the tall black thing that lincoln wore",
    ),
    "circle": (
        "the shape without a corner", "the shape that a compass draws", "the shape of a full coin",
        "the shape of a wheel without a hole",
    ),
    "square": (
        "the shape with four equal sides", "the shape of a chessboard's field",
        "the shape with four right corners, all sides alike", "the shape of one face of a die",
    ),
    "triangle": (
        "the shape with three sides", "the shape with three corners", "the shape of a pyramid's face",
        "the shape that pythagoras wrote about",
    ),
    "cross": (
        "the shape of a plus", "the sign of a first aid kit", "the sign on the flag of switzerland",
        "the sign of addition",
    ),
    "ring": (
        "the shape of a hoop", "the shape of the letter o", "the shape that five times makes the olympic flag",
        "the round shape with an empty middle",
    ),
}  # fmt: skip
"""At least four clues for every thing of the world."""

WISHES: dict[str, tuple[str, ...]] = {
    "umbrella": ("it is pouring outside and i have to go out", "i do not want to get wet on my walk"),
    "bed": ("i am so tired", "i was awake all night"),
    "clock": ("i always oversleep", "i never know what time it is"),
    "scissors": ("my hair is too long", "i have to cut out paper stars"),
    "key": ("i am locked out", "the door does not open"),
    "cake": ("it is my birthday tomorrow and guests are coming", "i want to blow out candles"),
    "book": ("i am bored and would like to read", "i need a story for tonight"),
    "tent": ("i want to sleep in the woods", "we go camping"),
    "boat": ("i have to cross the lake with the wind", "i want to sail"),
    "rocket": ("i want to leave the earth", "i have to get to mars"),
    "hammer": ("i have a nail and a wall", "the nail has to get in"),
    "camera": ("i want to remember this day in photos", "somebody has to take our picture"),
    "chair": ("my legs hurt and there is a table to sit at", "one more guest has no seat"),
    "backpack": ("i have to carry my books to school", "i go hiking with a lot of things"),
    "bicycle": ("i want to ride and stay fit", "i need something to pedal to work"),
    "guitar": ("i want to play a song by the fire", "i need six strings for my band"),
    "gift": ("my friend should be surprised with a ribbon", "i need something wrapped for my friend"),
    "cow": ("i need fresh milk", "i want to make my own butter"),
    "bee": ("i would like some honey", "somebody has to visit my flowers for honey"),
    "dog": ("somebody should guard my house", "i want a friend who fetches sticks"),
    "cat": ("there are mice in my kitchen", "i want a pet that purrs"),
    "helicopter": ("a climber has to be rescued from the mountain", "i must land without a runway"),
    "crown": ("tomorrow i will be king", "my costume is a queen's and the head is still bare"),
    "trophy": ("we won the final", "our champion needs something to lift up"),
    "anchor": ("my ship drifts away", "the ship should stay where it is"),
}  # fmt: skip
"""What somebody says who needs the thing, without naming it."""

COLOUR_CLUES: dict[str, tuple[str, ...]] = {
    "red": (
        "the colour of blood", "the colour of a stop light", "the colour of a fire engine",
        "the colour of ripe tomatoes",
    ),
    "orange": (
        "the colour of carrots", "the colour of pumpkins", "the colour of a basketball", "red mixed with yellow",
    ),
    "yellow": ("the colour of lemons", "the colour of bananas", "the colour of egg yolk", "the colour of a chick"),
    "green": (
        "the colour of grass", "the colour of frogs", "the colour of leaves in summer", "blue mixed with yellow",
    ),
    "blue": (
        "the colour of the clear sky", "the colour of jeans", "the colour of the sea on a map",
        "the colour of a sapphire",
    ),
    "purple": ("the colour of lavender", "red mixed with blue", "the colour of aubergines", "the colour of plums"),
    "black": ("the colour of coal", "the colour of the night", "the colour of ravens", "the colour of tar"),
    "white": ("the colour of snow", "the colour of milk", "the colour of a polar bear", "the colour of salt"),
    "pink": ("the colour of pigs", "the colour of flamingos", "red mixed with white", "the colour of bubble gum"),
    "brown": (
        "the colour of chocolate", "the colour of coffee beans", "the colour of a bear in the woods",
        "the colour of earth",
    ),
}  # fmt: skip
