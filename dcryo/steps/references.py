"""How class averages become the references of the next iteration of 2D classification."""

import numpy as np

from dcryo.steps.classification import Averages

# A class with less than this part of an equal share has lost its images.
DEAD = 0.1
# The resolution grows by so many shells an iteration at most, as far as halves of classes agree this well.
_GROWTH_SHELLS, _GROWS = 3, 0.25
# The mask carries what a ring holds over to so many others.
_LEAK_SHELLS = 2


def grown(shell: int, frc: np.ndarray, share: np.ndarray) -> int:
    """Up to which shell images are compared next: on from `shell`, up to which they were, as far as halves agree.

    frc: (K, R) correlation of the halves of classes with shares (K,).
    Where images were compared, the halves share the noise of the references that both were turned to. Only past that
    shell, and past what the mask carries on from there, is their correlation that of two independent halves.
    """
    beyond = np.average(frc[:, shell + 1 + _LEAK_SHELLS :], axis=0, weights=share)[:_GROWTH_SHELLS]
    # Single rings of a few classes are noisy.
    agree = np.cumsum(beyond) / np.arange(1, len(beyond) + 1) > _GROWS
    return shell + int(np.argmin(np.append(agree, False)))


def revived(averages: Averages, share: np.ndarray, unexplained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class images (K, D, D) and shares (K,) in which classes that lost their images share those of another: each gets
    the average of one of its halves. That is the largest, where it is far too large, and else the one that leaves most
    unexplained (Ueda et al. 2000 divide by such a criterion too).

    unexplained: (K,) power that the images of each class have beyond it and the noise.
    """
    images, share, unexplained = averages.images.copy(), share.copy(), unexplained.copy()
    for dead in np.flatnonzero(share < DEAD / len(share)):
        other = int(np.argmax(share))
        if share[other] < 2 / len(share):
            other = int(np.argmax(unexplained))
        if share[other] < 2 * DEAD / len(share):
            break
        images[other], images[dead] = (half[other] for half in averages.halves)
        share[other] = share[dead] = share[other] / 2
        unexplained[other] = unexplained[other] / 2
    return images, share


def centred(images: np.ndarray) -> np.ndarray:
    """Class images (K, D, D) moved by at most a pixel towards having their centre of mass in the middle, float32; their
    particles follow by themselves."""
    box = images.shape[1]
    axis = np.arange(box) - box // 2
    weight = np.clip(images - 0.2 * images.max(axis=(1, 2), keepdims=True), 0, None)
    total = np.maximum(weight.sum(axis=(1, 2)), 1e-20)
    x, y = (weight.sum(axis=1) @ axis) / total, (weight.sum(axis=2) @ axis) / total
    shift = -np.stack([x, y], axis=1)
    length = np.maximum(np.hypot(*shift.T), 1e-9)
    shift *= np.minimum(1, 1 / length)[:, None]
    frequency_x, frequency_y = np.fft.rfftfreq(box), np.fft.fftfreq(box)[:, None]
    phases = np.exp(-2j * np.pi * (shift[:, 0, None, None] * frequency_x + shift[:, 1, None, None] * frequency_y))
    return np.fft.irfft2(np.fft.rfft2(images) * phases, (box, box)).astype(np.float32)
