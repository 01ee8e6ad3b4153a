"""drsn_kernels.data: the simulated bearing obeys its physics, and no reader lets training and test data meet."""

import math
import sys

import pytest
import torch
from oracle import seeded

from drsn_kernels.data import load_cwru, simulate_bearing, standardise
from drsn_kernels.data.bearing import CLASSES, SAMPLING_RATE, Fault, Geometry, _Draw, _strikes, simulate_recordings

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLES = 24_000  # two seconds: a resolution of 0.5 Hz
RESOLUTION = SAMPLING_RATE / SAMPLES


def envelope_spectrum(x):
    """Amplitude spectrum of the squared envelope in the band of the resonances, median of 0 to 600 Hz scaled to 1."""
    frequency = torch.fft.fftfreq(x.shape[1], 1 / SAMPLING_RATE)
    band = torch.where((frequency > 1500) & (frequency < 4500), 2.0, 0.0)
    envelope = torch.fft.ifft(torch.fft.fft(x) * band).abs().square()
    spectrum = torch.fft.rfft(envelope - envelope.mean(1, keepdim=True)).abs()
    return spectrum / spectrum[:, : int(600 / RESOLUTION)].median(1, keepdim=True).values


def peak(spectrum, hertz):
    """Largest value (N,) within 1.5 % of a frequency (N,): the shaft wanders by 1 %."""
    bins = torch.arange(spectrum.shape[1]) * RESOLUTION
    near = (bins - hertz.unsqueeze(1)).abs() < 0.015 * hertz.unsqueeze(1)
    return torch.where(near, spectrum, 0.0).amax(1)


def test_orders_of_the_drive_end_bearing():
    # The manufacturer's multiples of the running speed as published with the CWRU data.
    bearing = Geometry()
    for value, published in (
        (bearing.inner, 5.4152),
        (bearing.outer, 3.5848),
        (bearing.cage, 0.39828),
        (bearing.ball, 4.7135),
    ):
        assert abs(value / published - 1) < 1e-3
    assert math.isclose(bearing.inner + bearing.outer, bearing.elements)


@pytest.mark.parametrize("name", CLASSES)
def test_envelope_spectrum_peaks_at_the_fault_frequency(name):
    faults = CLASSES[name]
    x, speed = simulate_recordings(faults, 16, SAMPLES, seeded(3))
    spectrum = envelope_spectrum(x)
    struck = {fault.element for fault in faults}
    for element in ("outer", "inner", "ball"):
        height = peak(spectrum, Geometry().order(element) * speed)
        if element in struck:
            wanted = 8 if len(struck) == 1 else 4  # of two spalls one drives the other's background up
            assert height.median() > wanted and height.min() > wanted / 2, element
        elif not struck:
            assert height.median() < 4, element
    if len(struck) == 1:  # the fault's own frequency stands out against the others'
        own = peak(spectrum, Geometry().order(*struck) * speed)
        for element in {"outer", "inner", "ball"} - struck:
            assert (own > peak(spectrum, Geometry().order(element) * speed)).float().mean() > 0.9


def test_load_zone_modulation_gives_sidebands():
    for element, order, unmodulated in (("inner", 1.0, "outer"), ("ball", Geometry().cage, "outer")):

        def sideband(kind, order=order):
            x, speed = simulate_recordings((Fault(kind, 0.5),), 16, SAMPLES, seeded(4))
            spectrum, centre = envelope_spectrum(x), Geometry().order(kind) * speed
            return (peak(spectrum, centre + order * speed) / peak(spectrum, centre)).median()

        assert sideband(element) > 0.35 > 2 * sideband(unmodulated)


def test_a_wider_spall_is_struck_harder_and_left_later():
    bearing = Geometry()
    # Pure rolling: the contact passes both races and the ball at one speed, here mm for each radian of the shaft.
    speeds = [
        (bearing.pitch_diameter + bearing.element_diameter) * bearing.cage / 2,
        (bearing.pitch_diameter - bearing.element_diameter) * (1 - bearing.cage) / 2,
        bearing.element_diameter * bearing.ball / 4,
    ]
    for speed in speeds:
        assert math.isclose(bearing.exit_angle(1.5), 0.75 / speed)
    for element in ("outer", "inner", "ball"):
        (angle, narrow), (same, wide) = (
            _strikes(Fault(element, width), bearing, 20.0, _Draw(4, seeded())) for width in (0.5, 1.5)
        )
        assert torch.equal(angle, same)
        torch.testing.assert_close(wide, math.sqrt(3) * narrow)


def test_strikes_slip_by_one_percent():
    bearing = Geometry()
    angle, _ = _strikes(Fault("outer", 0.5), bearing, 100.0, _Draw(50, seeded()))
    interval = angle.double().diff() * bearing.outer / (2 * math.pi)
    assert abs(interval.mean() - 1) < 1e-3 and abs(interval.std() - 0.01) < 5e-4


def test_healthy_vibration_is_shaft_harmonics_and_white_noise():
    x, speed = simulate_recordings((), 8, SAMPLES, seeded(6))
    power = torch.fft.rfft(x).abs().square()
    bins = torch.arange(power.shape[1]) * RESOLUTION
    low = bins < 4 * speed.max()
    strongest = bins[(power * low).argmax(1)]
    assert ((strongest / speed).round() >= 1).all()
    assert ((strongest / speed) - (strongest / speed).round()).abs().max() < 0.05
    floor = power[:, ~low]
    halves = floor[:, : floor.shape[1] // 2].mean() / floor[:, floor.shape[1] // 2 :].mean()
    assert abs(halves - 1) < 0.05


def test_simulated_windows_are_standardised_balanced_and_reproducible():
    data = simulate_bearing(3, 2, 4, length=512, generator=seeded(1))
    assert data.train_x.shape == (8 * 12, 1, 512) and data.test_x.shape == (8 * 8, 1, 512)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.train_y.bincount().tolist() == [12] * 8 and data.test_y.bincount().tolist() == [8] * 8
    assert len(data.class_names) == 8 and data.sampling_rate == 12_000
    for x in (data.train_x, data.test_x):
        assert x.mean(-1).abs().max() < 1e-5
        torch.testing.assert_close(x.square().mean(-1), torch.ones(len(x), 1), rtol=1e-4, atol=0)
    same, other = (simulate_bearing(3, 2, 4, length=512, generator=seeded(s)) for s in (1, 2))
    assert torch.equal(same.train_x, data.train_x) and torch.equal(same.test_x, data.test_x)
    assert not torch.equal(other.train_x, data.train_x)
    # Every recording has its own speed, so no test window repeats a training window.
    similarity = data.test_x.flatten(1) @ data.train_x.flatten(1).T / 512
    assert similarity.abs().max() < 0.99


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"train_recordings": 0}, "train_recordings must be a whole number of at least 1, got 0"),
        ({"windows_per_recording": 1.5}, "windows_per_recording must be a whole number of at least 1, got 1.5"),
        ({"length": 1}, "length must be a whole number of at least 2, got 1"),
    ],
)
def test_simulator_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_bearing(**arguments)


@pytest.fixture
def write():
    scipy_io = pytest.importorskip("scipy.io")

    def write(path, signal, channel="X105_DE_time", **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        column = torch.as_tensor(signal, dtype=torch.float64).reshape(-1, 1).numpy()
        scipy_io.savemat(path, {channel: column, "X105_FE_time": 0 * column, "X105RPM": 1797}, **options)
        return path

    return write


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1.0, 1e30])
def test_standardise_at_any_scale(scale):
    x = torch.randn(3, 1, 100, generator=seeded(), dtype=torch.float64) + 0.5
    wanted = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    tolerance = 0.02 if scale < 1e-38 else 1e-5  # a subnormal number has few bits
    torch.testing.assert_close(standardise((scale * x).float()), wanted.float(), atol=tolerance, rtol=0)
    assert not standardise(torch.full((1, 100), 0.1 * scale)).any()


def test_cwru_names_split_and_windows(tmp_path, write):
    signal = torch.randn(1000, generator=seeded(), dtype=torch.float64)
    for path in ("IR007_0.mat", "deep/B014_1.mat", "deep/er/OR021@6_2.mat", "OR021@3_0.mat"):
        write(tmp_path / path, signal)
    data = load_cwru(tmp_path, length=100, stride=30)
    assert data.class_names == ("IR007", "IR014", "IR021", "B007", "B014", "B021", "OR007", "OR014", "OR021")
    assert data.sampling_rate == 12_000
    # 700 samples hold 21 windows at a stride of 30; the 300 after the split hold 3.
    assert data.train_x.shape == (4 * 21, 1, 100) and data.test_x.shape == (4 * 3, 1, 100)
    assert data.train_x.dtype == torch.float32 and data.train_y.dtype == torch.int64
    assert data.train_y.bincount(minlength=9).tolist() == [21, 0, 0, 0, 21, 0, 0, 0, 42]
    assert data.test_y.bincount(minlength=9).tolist() == [3, 0, 0, 0, 3, 0, 0, 0, 6]

    def window(start):
        cut = signal[start : start + 100]
        return ((cut - cut.mean()) / cut.std(correction=0)).float()

    for index in range(21):
        torch.testing.assert_close(data.train_x[index, 0], window(30 * index), rtol=1e-4, atol=1e-5)
    for index in range(3):
        torch.testing.assert_close(data.test_x[index, 0], window(700 + 100 * index), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "samples, length, stride, fraction", [(1001, 100, 7, 0.7), (333, 64, 1, 0.5), (500, 33, 50, 0.9)]
)
def test_cwru_windows_never_cross_the_split(tmp_path, write, samples, length, stride, fraction):
    # One step at the split: a window that crossed it would not have one sign of slope.
    split = int(samples * fraction)
    time = torch.arange(samples, dtype=torch.float64)
    write(tmp_path / "IR007_0.mat", torch.where(time < split, time, -time))
    data = load_cwru(tmp_path, length=length, stride=stride, train_fraction=fraction)
    assert (data.train_x.diff() > 0).all() and (data.test_x.diff() < 0).all()
    assert len(data.train_x) == (split - length) // stride + 1
    assert len(data.test_x) == (samples - split) // length


def test_cwru_files_named_by_their_numbers(tmp_path, write, caplog):
    """As the source serves them, among others that are no 12 kHz drive-end faults and are left out."""
    names = ["IR007", "IR014", "IR021", "B007", "B014", "B021", "OR007", "OR014", "OR021", "normal"]
    for load in range(4):
        for label, first in enumerate((105, 169, 209, 118, 185, 222, 130, 197, 234, 97)):
            write(tmp_path / f"{first + load}.mat", tone(10 * (label + 1), 1000, 1000), f"X{first + load:03d}_DE_time")
    for other in (101, 109, 134, 144, 173, 3001):
        write(tmp_path / f"{other}.mat", tone(400, 1000, 1000))
    for loads in ((0, 1, 2), (3,)):
        data = load_cwru(tmp_path, length=100, loads=loads)
        assert data.class_names == (*names,) and data.test_y.bincount().tolist() == [3 * len(loads)] * 10
        # Every class has a pitch of its own: 10 Hz, which is bin 1, for the first.
        assert torch.equal(torch.fft.rfft(data.test_x[:, 0]).abs().argmax(1), data.test_y + 1)
        assert all(f"{other}.mat" in data.notes[0] for other in (101, 109, 134, 144, 173, 3001))
    write(tmp_path / "named" / "OR014@6_1.mat", tone(80, 1000, 1000))
    with pytest.raises(ValueError, match="one recording of each name.* holds .*198.mat and .*OR014@6_1.mat"):
        load_cwru(tmp_path)


@pytest.mark.parametrize("name", ["99.mat", "Normal_2.mat"])
def test_cwru_takes_the_channel_of_the_recording(tmp_path, name):
    """The public file holds the recording before as well."""
    channels = {f"X{number:03d}_DE_time": tone(hertz, 1000, 1000).numpy() for number, hertz in ((98, 50), (99, 200))}
    pytest.importorskip("scipy.io").savemat(tmp_path / name, channels)
    spectrum = torch.fft.rfft(load_cwru(tmp_path, length=100).test_x[:, 0]).abs()
    assert (spectrum.argmax(1) == 20).all()


def test_cwru_says_what_it_skips(tmp_path, write, caplog):
    for name in ("IR007_0.mat", "IR007_3.mat", "B028_0.mat", "Normal_0.mat", "readme.mat"):
        write(tmp_path / name, torch.randn(1000, generator=seeded()))
    with caplog.at_level("WARNING", "drsn_kernels"):
        data = load_cwru(tmp_path, length=100, normal=False)
    assert set(data.train_y.tolist()) == {0} and len(data.class_names) == 9
    other, missing = data.notes
    assert all(name in other for name in ("IR007_3.mat", "B028_0.mat", "Normal_0.mat", "readme.mat"))
    assert missing.startswith("No recordings of IR014, ") and "OR021" in missing
    assert caplog.messages == list(data.notes)
    assert len(load_cwru(tmp_path, length=100, loads=(3,)).train_x) == len(data.train_x)


def tone(hertz, samples, rate=48_000):
    return torch.sin(2 * math.pi * hertz / rate * torch.arange(samples, dtype=torch.float64))


def test_cwru_normal_baseline_is_brought_to_12_khz(tmp_path, write):
    samples = 240_000  # the public Normal_0.mat has 243,938, at 48 kHz
    write(tmp_path / "IR007_0.mat", torch.randn(20_000, generator=seeded()))
    write(tmp_path / "Normal_0.mat", tone(1000, samples) + tone(17_000, samples))
    data = load_cwru(tmp_path, length=1200)
    assert data.class_names[-1] == "normal" and len(data.class_names) == 10
    assert (data.test_y == 9).sum() == (samples * 3 // 10 // 4) // 1200
    spectrum = torch.fft.rfft(data.test_x[data.test_y == 9, 0]).abs()
    assert (spectrum.argmax(1) == 100).all()  # 1,000 Hz in bins of 10 Hz
    assert spectrum[:, 500].max() < 1e-3 * spectrum[:, 100].min()  # 17 kHz would fold to 5 kHz
    assert any("Decimated from 48 to 12 kHz: Normal_0.mat" in note for note in data.notes)
    assert any("recording chain" in note for note in data.notes)

    write(tmp_path / "Normal_0.mat", tone(1000, 60_000, rate=12_000))  # five seconds of a copy at 12 kHz
    copied = load_cwru(tmp_path, length=1200)
    assert (copied.test_y == 9).sum() == 15
    ours, theirs = (d.test_x[d.test_y == 9].flatten()[20:-20] for d in (data, copied))  # a filter begins and ends
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)
    assert not any("Decimated" in note for note in copied.notes)


def test_cwru_decimation_mixes_no_sample_across_the_split(tmp_path, write):
    signal = torch.randn(200_000, generator=seeded(), dtype=torch.float64)
    write(tmp_path / "IR007_0.mat", signal)  # a fault published at 48 kHz
    before = load_cwru(tmp_path, length=500, stride=500)
    signal[140_000:] = torch.randn(60_000, generator=seeded(1), dtype=torch.float64)
    write(tmp_path / "IR007_0.mat", signal)
    after = load_cwru(tmp_path, length=500, stride=500)
    assert len(before.train_x) == 70 and len(before.test_x) == 30
    assert torch.equal(before.train_x, after.train_x)
    assert not (before.test_x == after.test_x).flatten(1).all(1).any()


@pytest.mark.parametrize("compress", [False, True])
def test_cwru_truncated_file(tmp_path, write, compress):
    path = write(tmp_path / "IR007_0.mat", torch.randn(5000, generator=seeded()), do_compression=compress)
    whole = path.read_bytes()
    for size in (0, 1, 64, 127, 128, 132, 140, 200, len(whole) // 4):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="IR007_0.mat"):
            load_cwru(tmp_path, length=100)


def test_cwru_errors_name_the_file(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="folder does not exist: .*nowhere"):
        load_cwru(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="named like IR007_0.mat, .* or 105.mat, .* has none among its 0 .mat files"):
        load_cwru(tmp_path)
    (tmp_path / "a file").write_text("x")
    with pytest.raises(NotADirectoryError, match="folder must be a directory .* got the file .*a file"):
        load_cwru(tmp_path / "a file")

    noise = torch.randn(1000, generator=seeded())
    path = write(tmp_path / "data" / "IR007_0.mat", noise, channel="X105_BA_time")
    message = "IR007_0.mat must hold one drive-end channel, \\*_DE_time, but holds X105RPM, X105_BA_time, X105_FE_time"
    with pytest.raises(ValueError, match=message):
        load_cwru(path.parent, length=100)
    for bad, message in (
        (noise[:200], "IR007_0.mat is too short: its 140 samples for training and 60 for testing leave no window"),
        (torch.full((1000,), float("nan")), "IR007_0.mat holds NaN or Inf"),
        (torch.cat([noise, torch.zeros(500)]), "IR007_0.mat holds 100 equal samples in a row"),
        (torch.cat([tone(100, 190_000), torch.zeros(9000)]), "IR007_0.mat holds 100 equal samples in a row"),
    ):
        write(path, bad)
        with pytest.raises(ValueError, match=message):
            load_cwru(path.parent, length=100)
    scipy_io = pytest.importorskip("scipy.io")
    for bad in ("text", {"a": 1.0}, [[1j] * 1000], torch.ones(1000, 2).numpy(), [["cell"], [1.0]]):
        scipy_io.savemat(path, {"X105_DE_time": bad})
        message = "IR007_0.mat must hold real numbers in one row or column as its drive-end channel X105_DE_time, but"
        with pytest.raises(ValueError, match=message):
            load_cwru(path.parent, length=100)
    path.write_text("not a MATLAB file, but long enough to look for a header in it" * 10)
    with pytest.raises(ValueError, match="IR007_0.mat cannot be read as a MATLAB file"):
        load_cwru(path.parent, length=100)
    for name in ("IR007_0.mat", "48k/ir007_0.mat"):
        write(path.parent / name, noise)
    message = "(?i)folder must hold one recording of each name.* holds .*IR007_0.mat and .*IR007_0.mat"
    with pytest.raises(ValueError, match=message):
        load_cwru(path.parent, length=100)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"length": "a"}, "length must be a whole number of at least 1, got 'a'"),
        ({"stride": 0}, "stride must be a whole number of at least 1, got 0"),
        ({"train_fraction": 1.0}, "train_fraction must lie between 0 and 1, got 1.0"),
    ],
)
def test_cwru_argument_errors(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_cwru(tmp_path, **arguments)


def test_cwru_without_scipy_names_it(tmp_path, write, monkeypatch):
    write(tmp_path / "IR007_0.mat", torch.randn(1000, generator=seeded()))
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        load_cwru(tmp_path, length=100)
