"""Weights as the vector kernels read them, one module for each format.

A *row* is an output pixel of an image. It reads a *window* of bytes, which has *runs* of inputs
with gaps between them: for a 3 x 3 convolution three runs, each of 3 * channels bytes::

    image    . . . . . . . . . .         window   [run of 3 pixels]
             . . A B C . . . . .                  gap: the rest of a row of pixels
             . . D E F . . . . .                  [run of 3 pixels]
             . . G H I . . . . .                  gap
             . . . . . . . . . .                  [run of 3 pixels]

A packer takes a matrix int8 [channels, inputs] and the ascending byte offset of each input from the
window's start. Registers hold four weights for each of some *lanes*, one lane for each output
channel: 16 lanes of 512 bits, 8 of 256, 4 of 128. A *step* multiplies a register of weights with
bytes of the window and adds the four products of each lane to its sum. ::

    dense      four bytes of the window for every lane; all weights are stored
               bytes    abcd  ->  abcd abcd abcd abcd ...
               weights            wwww wwww wwww wwww ...

    blocks     the same, without the steps whose weights are all zero
               offsets  8, 20     weights of step 2, weights of step 5

    bitmask    the same, without the zeros themselves; expanded before they are multiplied
               mask     1010 0001 ...     values  www...  ->  w0w0 000w ...

    permuted   each lane has four bytes of its own, taken from one load of the window or two
               bytes    ################ (64 at an offset) ################ (64 at another)
               indices            iiii iiii iiii iiii ...
               weights            wwww wwww wwww wwww ...

``dense`` also exists with two int4 weights in a byte, as it pays where weights stream from memory:
for FULLY_CONNECTED. Its sums are 16 times too large, exactly.

All arrays are contiguous, and as long as whole registers that are loaded from them, see ``closed``
in ``layout``. ``reach`` tells how many bytes from a window's start a kernel reads, past the last
input and in the gaps too: what lies there is multiplied with zero, but has to be memory.
``permuted`` may change the order of channels and says how.
"""
