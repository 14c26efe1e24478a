"""Networks saved by Keras 2: their configuration is translated into that of Keras 3."""

import inspect
import json
import zipfile

import h5py
import keras

MODULES = (keras.layers, keras.regularizers, keras.constraints)
DIFFERENT = ("RandomCrop", "hard_sigmoid")  # Keras 3 has them, and computes something else
RENAMED = {"alpha": "negative_slope", "batch_input_shape": "batch_shape"}
# Arguments that a class of Keras 3 may lack: these do not matter, and others do not if they have a neutral value.
IRRELEVANT = ("batch_shape", "rng_type", "trainable")
NEUTRAL = {"groups": 1}
# Functions of TensorFlow between a tensor and a constant, as scale and offset of a Rescaling layer.
FUNCTIONS = {
    "__operators__.add": lambda y: (1, y),
    "math.add": lambda y: (1, y),
    "math.multiply": lambda y: (y, 0),
    "math.subtract": lambda y: (1, -y),
    "math.truediv": lambda y: (1 / y, 0),
}


def load_keras2(path):
    """Loads a network that Keras 2 saved as .keras or .h5; no code in it is run.

    Raises:
        NotImplementedError: Keras 3 does not have a part of the network, computes it differently, or stores its weights
            in another way, as Keras 2.13 did in .keras files.
    """
    _, text = read_config(path)
    for name in DIFFERENT:
        if f'"{name}"' in text:
            raise NotImplementedError(f"{name} is computed differently in Keras 3")
    config = json.loads(text.replace("/", "_"))  # a slash, which names in Keras 3 cannot have
    model = keras.saving.deserialize_keras_object(translate(config))
    try:
        model.load_weights(path)
    except ValueError:
        hint = "; save it as .h5 with Keras 2" if zipfile.is_zipfile(path) else ""
        raise NotImplementedError(f"its weights are not stored as Keras 3 reads them{hint}") from None
    return model


def read_config(path):
    """Version of Keras that saved a .keras or .h5 file, and the configuration of the network in JSON."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            return str(json.loads(file.read("metadata.json"))["keras_version"]), file.read("config.json").decode()
    with h5py.File(path) as file:
        return str(file.attrs["keras_version"]), str(file.attrs["model_config"])


def translate(config):
    """Translates a part of the configuration: an object with its class, a list, or a value."""
    if isinstance(config, list):
        return [translate(part) for part in config]
    if not isinstance(config, dict) or "class_name" not in config:
        return config
    name, arguments = config["class_name"], config["config"]
    if name == "Functional":
        return translate_functional(arguments)
    if name == "function":
        return arguments
    if name == "Policy":
        return arguments["name"]
    if name == "Sequential":
        shape = arguments["layers"][0]["config"].get("batch_input_shape")
        arguments = {"name": arguments["name"], "layers": arguments["layers"], "build_input_shape": shape}
        return {"module": "keras", "class_name": name, "config": {k: translate(v) for k, v in arguments.items()}}
    module = next((module for module in MODULES if inspect.isclass(getattr(module, name, None))), None)
    if name == "Lambda":
        raise NotImplementedError("code in a Lambda layer is not run")
    if module is None or not str(config.get("module", "keras")).startswith(("keras", "tf_keras")):
        raise NotImplementedError(f"{name} is not a part of Keras 3")
    arguments = translate_arguments(getattr(module, name), arguments)
    return {"module": module.__name__, "class_name": name, "config": arguments}


def translate_arguments(kind, arguments):
    """Translates the arguments of a class."""
    parameters, translated = {}, {}
    for base in kind.__mro__:
        parameters |= inspect.signature(base.__init__).parameters
        if "kwargs" not in parameters:  # it passes none on to its base
            break
    for name, value in arguments.items():
        name = name if name in parameters else RENAMED.get(name, name)
        if name.endswith("initializer"):  # the weights are loaded anyway
            continue
        if name in parameters:
            value = value[0] if name == "axis" and isinstance(value, list) and len(value) == 1 else value
            translated[name] = translate(value)
        elif name not in IRRELEVANT and value not in (None, False, NEUTRAL.get(name)):
            raise NotImplementedError(f"{kind.__name__} has no {name} in Keras 3")
    return translated


def translate_functional(config):
    """Translates a functional model: its layers, and the nodes that connect them."""
    kinds = {layer["name"]: layer["class_name"] for layer in config["layers"]}

    def move(tensor, models):  # Keras 2 counts the calls of a model from 1
        name, node, *others = tensor
        return [name, node - (kinds.get(name) in models), *others]

    layers = []
    for layer in config["layers"]:
        nodes = [[node] if isinstance(node[0], str) else node for node in layer["inbound_nodes"]]
        if layer["class_name"] == "TFOpLambda":
            translated = translate_function(layer["config"], nodes)
        else:
            translated = translate(layer)
        nodes = [[move(tensor, ("Functional", "Sequential")) for tensor in node] for node in nodes]
        layers.append(translated | {"name": layer["name"], "inbound_nodes": nodes})
    ends = {}
    for name in "input_layers", "output_layers":
        tensors = [config[name]] if isinstance(config[name][0], str) else config[name]
        tensors = [move(tensor, ("Sequential",)) for tensor in tensors]  # Keras 3 subtracts 1 from the others here
        ends[name] = tensors[0] if len(tensors) == 1 else tensors
    return {"module": "keras", "class_name": "Model", "config": config | ends | {"layers": layers}}


def translate_function(config, nodes):
    """Translates a function of TensorFlow into a Rescaling layer; `nodes` loses the constant."""
    name, tensor = config["function"], nodes[0][0]
    constant = tensor[3].get("y")
    if name not in FUNCTIONS or not isinstance(constant, int | float):
        raise NotImplementedError(f"tf.{name} is not a part of Keras 3")
    tensor[3] = {}
    scale, offset = FUNCTIONS[name](constant)
    arguments = {"name": config["name"], "scale": scale, "offset": offset}
    return {"module": "keras.layers", "class_name": "Rescaling", "config": arguments}
