// A board around the Verilated system: SDRAM chip at the pins, bit-timed serial line at the wires.
// The functions are called by moeware.sim.board_device. Time moves only in board_receive and
// board_idle.
#include <algorithm>
#include <deque>
#include <memory>
#include <string>

#include "Vtop.h"
#include "sdram_chip.h"
#include "verilated.h"

// Verilator's name of the port "pads__NAME".
#define PAD(name) pads___05F##name

namespace {

// The host's side of the line: 8N1, bits placed to a fraction of a cycle.
class HostSerial {
  public:
    std::deque<uint8_t> to_send, received;
    bool framing_error = false;

    explicit HostSerial(double cycles_per_bit) : bit(cycles_per_bit) {}

    // The level that the host drives in this cycle.
    bool drive(uint64_t cycle) {
        if (!sending) {
            if (to_send.empty()) return true;
            frame = 0x200 | to_send.front() << 1;  // start bit, data, stop bit
            to_send.pop_front();
            sending = true;
            send_start = cycle > send_end ? cycle : send_end;
        }
        int index = int((cycle - send_start) / bit);
        if (index < 10) return frame >> index & 1;
        sending = false;
        send_end = send_start + 10 * bit;
        return to_send.empty() ? true : drive(cycle);
    }

    // The level that the board drives in this cycle.
    void sample(uint64_t cycle, bool level) {
        if (bits_left == 0) {
            if (level) return;
            bits_left = 10;
            next_sample = cycle + bit / 2;
        }
        if (cycle < next_sample) return;
        next_sample += bit;
        shift = shift >> 1 | level << 9;
        if (--bits_left == 0) {
            if ((shift & 0x201) == 0x200) received.push_back(shift >> 1);
            else framing_error = true;
        }
    }

  private:
    double bit, send_start = 0, send_end = 0, next_sample = 0;
    int frame = 0, shift = 0, bits_left = 0;
    bool sending = false;
};

struct Board {
    VerilatedContext context;
    std::unique_ptr<Vtop> top;
    SDRAMChip chip;
    uint32_t rate;  // chip clocks in a cycle
    HostSerial serial;
    uint64_t cycle = 0;
    std::string error;

    Board(const ChipRules &rules, uint32_t rate, double cycles_per_bit)
        : chip(rules), rate(rate), serial(cycles_per_bit) {
        context.randReset(2);
        context.randSeed(1);
        top = std::make_unique<Vtop>(&context);
        top->clk = 0;
        top->rst = 1;
        top->rx = 1;
        top->eval();
        for (int i = 0; i < 2; ++i) {
            top->clk = 1;
            top->eval();
            top->clk = 0;
            top->eval();
        }
        top->rst = 0;
    }

    void step() {
        ChipPins pins{};
        pins.clock_enable = top->PAD(clock_enable);
        pins.ras = top->PAD(ras);
        pins.cas = top->PAD(cas);
        pins.we = top->PAD(we);
        pins.bank = top->PAD(bank);
        pins.address = top->PAD(address);
        pins.dqm = top->PAD(dqm);
        pins.dq_oe = top->PAD(dq_oe);
        serial.sample(cycle, top->tx);
        top->rx = serial.drive(cycle);
        uint32_t dq_i = 0;
        for (uint32_t slot = 0; slot < rate; ++slot) {
            pins.cs = top->PAD(cs) >> slot & 1;
            pins.dq_o = uint16_t(top->PAD(dq_o) >> 16 * slot);
            dq_i |= uint32_t(chip.step(pins)) << 16 * slot;
        }
        ++cycle;
        top->clk = 1;
        top->eval();
        top->PAD(dq_i) = dq_i;
        top->clk = 0;
        top->eval();
        if (serial.framing_error) throw std::runtime_error("Serial line: a byte without a stop bit");
    }

    bool run(uint64_t cycles, size_t bytes) {
        try {
            while (cycles-- && serial.received.size() < bytes) step();
        } catch (const std::runtime_error &problem) {
            error = problem.what();
        }
        return error.empty();
    }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

Board *board_new(const ChipRules *rules, uint32_t rate, double cycles_per_bit) {
    return new Board(*rules, rate, cycles_per_bit);
}

void board_free(Board *board) { delete board; }

void board_send(Board *board, const uint8_t *bytes, size_t count) {
    board->serial.to_send.insert(board->serial.to_send.end(), bytes, bytes + count);
}

// Runs until `count` bytes have come or `cycles` have passed; returns the bytes taken, -1 on error.
int64_t board_receive(Board *board, uint8_t *bytes, size_t count, uint64_t cycles) {
    if (!board->run(cycles, count)) return -1;
    auto &received = board->serial.received;
    size_t taken = received.size() < count ? received.size() : count;
    std::copy_n(received.begin(), taken, bytes);
    received.erase(received.begin(), received.begin() + taken);
    return int64_t(taken);
}

int64_t board_idle(Board *board, uint64_t cycles) {
    return board->run(cycles, ~size_t(0)) ? 0 : -1;
}

const char *board_error(const Board *board) { return board->error.c_str(); }

uint64_t board_cycles(const Board *board) { return board->cycle; }

// The chip's cells as little-endian bytes.
uint8_t *board_memory(Board *board) {
    return reinterpret_cast<uint8_t *>(board->chip.cells.data());
}

}  // extern "C"
#pragma GCC visibility pop
