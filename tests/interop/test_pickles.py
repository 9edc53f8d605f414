"""Pickles are read, and never run."""

import collections
import contextlib
import fractions
import io
import os
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpp_jax.interop.pickles import Global, Record, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
keys = st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
plain = st.recursive(
    st.none() | st.booleans() | keys | st.integers(-(2**200), 2**200) | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.dictionaries(keys, inner).map(collections.OrderedDict)
    ),
)


def read(data, persistent=None):
    return read_pickle(io.BytesIO(data), persistent)


# Protocols 0 to 2 write bytes by a call, which is recorded and not made.
@given(plain, st.sampled_from(PROTOCOLS[3:]))
def test_data_is_read_as_python_reads_it(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@given(st.recursive(keys, st.lists), st.sampled_from(PROTOCOLS[:3]))
def test_data_of_old_protocols_is_too(value, protocol):
    assert read(pickle.dumps([value, (value,)], protocol)) == [value, (value,)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_set_is_a_list(protocol):
    assert sorted(read(pickle.dumps({3, 1, 2}, protocol))) == [1, 2, 3]
    assert read(pickle.dumps(frozenset([1]), protocol)) == [1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_value_that_is_there_twice_is_read_once(protocol):
    inner = [1]
    first, second = read(pickle.dumps([inner, inner], protocol))
    assert first is second


def test_the_stream_is_left_behind_the_pickle():
    stream = io.BytesIO(pickle.dumps("first") + pickle.dumps("second") + b"rest")
    assert [read_pickle(stream), read_pickle(stream)] == ["first", "second"]
    assert stream.read() == b"rest"


class Thing:
    """With a state, as most classes have."""

    def __init__(self):
        self.size = 3


class WithSetState(Thing):
    def __setstate__(self, state):
        raise AssertionError("it was run")


class WithReduce:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", [Thing, WithSetState])
def test_an_object_is_a_record_of_its_state(kind, protocol):
    record = read(pickle.dumps(kind(), protocol))
    assert isinstance(record, Record)
    assert record.state == {"size": 3}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_is_a_record_of_what_would_be_called(protocol):
    record = read(pickle.dumps(fractions.Fraction(1, 2), protocol))
    assert record.callee == Global("fractions.Fraction")
    assert read(pickle.dumps(os.path.join, protocol)).name.endswith("path.join")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr])
def test_nothing_that_a_pickle_names_is_run(function, protocol, tmp_path):
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')"
    args = {
        os.system: (f"touch {trace}",),
        eval: (code,),
        exec: (code,),
        __import__: ("antigravity",),
        getattr: (WithReduce(eval, code), "close"),
    }[function]
    data = pickle.dumps({"a": WithReduce(function, *args)}, protocol)
    assert isinstance(read(data)["a"], Record)
    assert not trace.exists()


def short(text):
    return b"\x8c" + bytes([len(text)]) + text


EVAL = b"\x80\x04" + short(b"builtins") + short(b"eval") + b"\x93"
ODD = {
    "an object by INST": b"(S'1/0'\nibuiltins\neval\n.",
    "an object by OBJ": b"(cbuiltins\neval\nS'1/0'\no.",
    "an object by NEWOBJ": EVAL + short(b"1/0") + b"\x85\x81.",
    "an object by NEWOBJ_EX": EVAL + short(b"1/0") + b"\x85}\x92.",
    "a call of the result of a call": EVAL + short(b"1/0") + b"\x85R)R.",
    "a state for a function": EVAL + b"}" + short(b"__code__") + b"Nsb.",
    "slots for a function": EVAL + b"N}" + short(b"__defaults__") + b"Ns\x86b.",
    "items for a function": EVAL + short(b"key") + b"Ns.",
    "elements for a function": EVAL + b"(Ne.",
    "a state for a dict": b"\x80\x04}}" + short(b"keys") + b"Nsb.",
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_odd_ways_to_make_objects_do_nothing(data):
    before = eval, read_pickle.__defaults__
    assert isinstance(read(data), (Record, Global, dict))
    assert before == (eval, read_pickle.__defaults__)


BROKEN = {
    "nothing": b"",
    "no end": pickle.dumps([1, 2])[:-1],
    "no instruction": b"\xff",
    "an empty stack": b".",
    "two results": b"NN.",
    "no mark": b"t.",
    "arguments that are missing": b"cbuiltins\neval\nR.",
    "a value that was never kept": b"h\x05.",
    "an extension's code": b"\x82\x01.",
    "a buffer outside": b"\x80\x05\x97.",
    "a reference outside": b"NQ.",
    "a text of a terabyte": b"\x8d" + struct.pack("<q", 2**40) + b"x.",
    "keys without a value": b"(NNNd.",
    "a pop too many": b"0.",
    "a number of 300 digits": pickle.dumps(10**300),
    "a global of a long name": b"c" + b"a" * 300 + b"\neval\n.",
    "a global that is no text": b"\x80\x04K\x01K\x02\x93.",
    "a set of a number": b"cbuiltins\nset\n(K\x01tR.",
    "a set of two lists": b"cbuiltins\nset\n(]]tR.",
    "an OrderedDict of numbers": b"ccollections\nOrderedDict\n(]K\x01atR.",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_pickle_is_an_error(data):
    with pytest.raises((ValueError, TypeError, AttributeError, LookupError)):
        read(data)


@given(st.binary(), st.integers(0, 200))
def test_a_damaged_pickle_is_read_or_an_error(noise, place):
    data = bytearray(pickle.dumps({"a": [1, Thing(), ("b", 2.5)], 3: b"c"}))
    data[place : place + len(noise)] = noise
    with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError):
        read(bytes(data))


def test_numbers_beyond_64_bits_are_left_out_as_keys_only():
    assert read(pickle.dumps({2**63: 1, 3: 2**63})) == {3: 2**63}


def test_keys_nested_deeply_are_left_out():
    deep = b"N" + b"\x85" * 200_000
    assert read(b"\x80\x02}" + deep + b"K\x01s.") == {}


def test_a_memo_at_four_billion_takes_no_room():
    assert read(b"Nr" + struct.pack("<I", 2**32 - 1) + b".") is None


def test_a_reference_outside_is_looked_up_by_the_caller():
    assert read(b"K\x07Q.", lambda identity: identity + 1) == 8
    assert read(b"Pseven\n.", str.upper) == "SEVEN"
