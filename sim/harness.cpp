// An accelerator under Verilator with its DRAM and its host, as a C library for ctypes.
//
// Each cycle drives the inputs from the harness's own state alone, lets the outputs settle, notes
// what is transferred, and clocks. What the accelerator does against the rules of its ports ends the
// simulation with a message.

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <string>

#include "Vtop.h"
#include "dram.h"
#include "verilated.h"

// Verilator's way to spell a double underscore.
#define memory__read_command__payload memory___05Fread_command___05Fpayload
#define memory__read_command__ready memory___05Fread_command___05Fready
#define memory__read_command__valid memory___05Fread_command___05Fvalid
#define memory__read_data__payload memory___05Fread_data___05Fpayload
#define memory__read_data__ready memory___05Fread_data___05Fready
#define memory__read_data__valid memory___05Fread_data___05Fvalid
#define memory__write_command__payload memory___05Fwrite_command___05Fpayload
#define memory__write_command__ready memory___05Fwrite_command___05Fready
#define memory__write_command__valid memory___05Fwrite_command___05Fvalid
#define memory__write_data__payload memory___05Fwrite_data___05Fpayload
#define memory__write_data__ready memory___05Fwrite_data___05Fready
#define memory__write_data__valid memory___05Fwrite_data___05Fvalid
#define memory__written memory___05Fwritten
#define registers__request__payload registers___05Frequest___05Fpayload
#define registers__request__ready registers___05Frequest___05Fready
#define registers__request__valid registers___05Frequest___05Fvalid
#define registers__response__payload registers___05Fresponse___05Fpayload
#define registers__response__ready registers___05Fresponse___05Fready
#define registers__response__valid registers___05Fresponse___05Fvalid

namespace {

constexpr uint32_t PAGE = 4096;  // no burst crosses a multiple of it
constexpr uint32_t STATUS = 3, BUSY = 1, DONE = 2, ERROR = 4;
constexpr uint32_t ANSWER_CYCLES = 10000;  // longest wait for a register
constexpr uint32_t POLL_CYCLES = 64;

// Bits of the port `events` (hw/events.py): four of the whole, then as many of each engine.
constexpr unsigned ENGINES = 5, ENGINE_BITS = 11, FIRST_ENGINE = 4, LINEAR = 1, ATTENTION = 2;
constexpr uint64_t START = 1, READ = 2, WRITE = 4;
constexpr uint64_t engine_bit(unsigned engine, unsigned bit) {
    return uint64_t(1) << (FIRST_ENGINE + ENGINE_BITS * engine + bit);
}
constexpr uint64_t each_engine(unsigned bit) {
    uint64_t bits = 0;
    for (unsigned engine = 0; engine < ENGINES; engine++)
        bits |= engine_bit(engine, bit);
    return bits;
}
enum { STARTED, SKIPPED, ENGINE_DONE, ENGINE_BUSY, STALLED };
constexpr uint64_t PULSES = START | each_engine(STARTED) | each_engine(SKIPPED) | each_engine(ENGINE_DONE);
constexpr uint64_t COUNTED = READ | WRITE | each_engine(STALLED);

// A stretch of cycles in which no event changed but those that are counted; one cycle if a pulse
// came. sim/events.py has the same.
struct Stretch {
    uint64_t cycle, events;  // its first
    uint32_t stalled[ENGINES];
    // Cycles by what works: 1 the linear unit, 2 the attention unit, 4 the bus, and their sums.
    uint32_t working[8];
};

// Withholds a channel at random, in phases that differ in how often.
class Stalls {
public:
    void seed(uint64_t value) { state = value * 0x9E3779B97F4A7C15ull | 1; }
    bool draw() {
        if (!state)
            return false;
        if (!left--) {
            left = next() % 64;
            threshold = LEVELS[next() % 5];
        }
        return next() % 256 < threshold;
    }

private:
    static constexpr uint32_t LEVELS[5] = {0, 64, 128, 192, 240};
    uint64_t state = 0;
    uint32_t left = 0, threshold = 0;
    uint32_t next() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return uint32_t(state >> 32);
    }
};

// Watches a stream that the accelerator drives: valid and payload hold until ready.
template <typename Payload>
struct Watch {
    const char *name;
    bool held = false;
    Payload payload{};
    // Null if all is well.
    const char *step(bool valid, bool ready, const Payload &now) {
        if (held && !valid)
            return "withdrew valid before ready";
        if (held && std::memcmp(&payload, &now, sizeof(Payload)))
            return "changed its payload before ready";
        held = valid && !ready;
        if (held)
            std::memcpy(&payload, &now, sizeof(Payload));
        return nullptr;
    }
};

class Simulation {
public:
    std::string error;
    uint64_t cycles = 0;
    Dram dram;
    bool logs = false;
    std::vector<Stretch> log;

    Simulation(const DramTiming &timing, uint64_t stall_seed, uint32_t reset_seed)
        : dram(timing), bus_bytes(timing.bus_bytes) {
        context.randReset(2);
        context.randSeed(int(reset_seed % 0x7FFFFFFF) + 1);
        top.reset(new Vtop(&context));
        if (stall_seed)
            for (size_t i = 0; i < CHANNELS; i++)
                stalls[i].seed(stall_seed * CHANNELS + i);
        if (sizeof(top->memory__read_data__payload) != bus_bytes)
            fail("has a memory bus of another width than the configuration");
        // Inputs start at random too.
        top->memory__read_data__valid = top->registers__request__valid = top->memory__written = 0;
        top->rst = 1;
        for (int i = 0; i < 4; i++)
            clock();
        top->rst = 0;
    }

    ~Simulation() { top->final(); }

    bool access(bool write, uint32_t index, uint32_t data, uint32_t *answer) {
        begin(write, index, data);
        for (uint32_t i = 0; i < ANSWER_CYCLES && error.empty(); i++) {
            cycle();
            if (answered) {
                *answer = response;
                return true;
            }
        }
        if (error.empty())
            fail("did not answer an access to register %u within %u cycles", index, ANSWER_CYCLES);
        return false;
    }

    // Runs until STATUS says that the run is over, for `limit` cycles at most; whether it is over.
    bool run(uint64_t limit) {
        const uint64_t end = cycles + limit;
        while (cycles < end && error.empty()) {
            uint32_t status;
            if (!access(false, STATUS, 0, &status))
                return false;
            if (!(status & BUSY) && status & (DONE | ERROR))
                return true;
            for (uint32_t i = 0; i < POLL_CYCLES && cycles < end && error.empty(); i++)
                cycle();
        }
        return false;
    }

private:
    enum { READ_COMMAND, READ_DATA, WRITE_COMMAND, WRITE_DATA, WRITTEN, REQUEST, RESPONSE, CHANNELS };

    VerilatedContext context;
    std::unique_ptr<Vtop> top;
    uint32_t bus_bytes;
    Stalls stalls[CHANNELS];
    bool request_waits = false, answered = false;
    uint32_t response = 0;
    Watch<uint64_t> read_command{"memory.read_command"}, write_command{"memory.write_command"};
    Watch<std::remove_reference<decltype(Vtop::memory__write_data__payload)>::type>
        write_data{"memory.write_data"};
    Watch<uint32_t> answers{"registers.response"};
    uint64_t beats_announced = 0, beats_written = 0;

    void fail(const char *format, ...) {
        if (!error.empty())
            return;
        char text[512];
        va_list arguments;
        va_start(arguments, format);
        std::vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        error = std::string(text) + " (cycle " + std::to_string(cycles) + ")";
    }

    void begin(bool write, uint32_t index, uint32_t data) {
        top->registers__request__payload =
            uint64_t(data) << 9 | uint64_t(index & 0xFF) << 1 | uint64_t(write);
        request_waits = true;
        answered = false;
    }

    void clock() {
        top->clk = 0;
        top->eval();
        top->clk = 1;
        top->eval();
    }

    // Whether a burst obeys the rules of the port.
    bool legal(const char *what, uint64_t burst) {
        const uint32_t address = uint32_t(burst), beats = uint32_t(burst >> 32) & 0x1FFF;
        const uint64_t last = uint64_t(address) + uint64_t(beats) * bus_bytes - 1;
        if (!beats || address % bus_bytes)
            fail("asked for a %s of %u bus words at %#x: it must be one word at least and aligned",
                 what, beats, address);
        else if (address / PAGE != last / PAGE)
            fail("asked for a %s from %#x to %#llx, across a 4096-byte boundary", what, address,
                 (unsigned long long)last);
        else if (last >= dram.bytes.size())
            fail("asked for a %s from %#x to %#llx, past the end of a DRAM of %#zx bytes", what,
                 address, (unsigned long long)last, dram.bytes.size());
        return error.empty();
    }

    void note(uint64_t events) {
        const uint64_t state = events & ~COUNTED;
        if (log.empty() || state & PULSES || state != (log.back().events & ~COUNTED)) {
            log.emplace_back();
            log.back().cycle = cycles;
            log.back().events = events;
        }
        Stretch &stretch = log.back();
        unsigned working = events & (READ | WRITE) ? 4 : 0;
        for (unsigned engine = 0; engine < ENGINES; engine++)
            stretch.stalled[engine] += (events & engine_bit(engine, STALLED)) != 0;
        for (unsigned engine : {LINEAR, ATTENTION})
            if (events & engine_bit(engine, ENGINE_BUSY) && !(events & engine_bit(engine, STALLED)))
                working += engine;
        stretch.working[working]++;
    }

    template <typename W, typename P>
    void watch(W &watched, bool valid, bool ready, const P &payload) {
        if (const char *fault = watched.step(valid, ready, payload))
            fail("%s %s", watched.name, fault);
    }

    void cycle() {
        Vtop &t = *top;
        t.memory__read_command__ready = dram.takes_read() && !stalls[READ_COMMAND].draw();
        t.memory__write_command__ready = dram.takes_write() && !stalls[WRITE_COMMAND].draw();
        t.memory__write_data__ready = dram.takes_word() && !stalls[WRITE_DATA].draw();
        t.memory__written = dram.has_written() && !stalls[WRITTEN].draw();
        // Once offered, a word or request stays until it is taken.
        if (!t.memory__read_data__valid && dram.has_word() && !stalls[READ_DATA].draw()) {
            t.memory__read_data__valid = 1;
            std::memcpy(&t.memory__read_data__payload, dram.word(), bus_bytes);
        }
        if (!t.registers__request__valid && request_waits && !stalls[REQUEST].draw())
            t.registers__request__valid = 1;
        t.registers__response__ready = !stalls[RESPONSE].draw();

        t.clk = 0;
        t.eval();
        const uint64_t read_burst = t.memory__read_command__payload;
        const uint64_t write_burst = t.memory__write_command__payload;
        watch(read_command, t.memory__read_command__valid, t.memory__read_command__ready, read_burst);
        watch(write_command, t.memory__write_command__valid, t.memory__write_command__ready, write_burst);
        watch(write_data, t.memory__write_data__valid, t.memory__write_data__ready,
              t.memory__write_data__payload);
        watch(answers, t.registers__response__valid, t.registers__response__ready,
              uint32_t(t.registers__response__payload));

        if (logs)
            note(t.events);
        const bool read_taken = t.memory__read_data__valid && t.memory__read_data__ready;
        const bool request_taken = t.registers__request__valid && t.registers__request__ready;
        if (t.memory__read_command__valid && t.memory__read_command__ready
            && legal("read", read_burst))
            dram.read(uint32_t(read_burst), uint32_t(read_burst >> 32) & 0x1FFF);
        if (t.memory__write_command__valid && t.memory__write_command__ready
            && legal("write", write_burst))
            dram.write(uint32_t(write_burst), uint32_t(write_burst >> 32) & 0x1FFF);
        if (t.memory__write_data__valid && t.memory__write_data__ready)
            dram.give_word(&t.memory__write_data__payload);
        if (t.memory__written)
            dram.take_written();
        if (t.registers__response__valid && t.registers__response__ready) {
            answered = true;
            response = t.registers__response__payload;
        }

        t.clk = 1;
        t.eval();
        dram.advance();
        cycles++;
        if (read_taken) {
            dram.take_word();
            t.memory__read_data__valid = 0;
        }
        if (request_taken) {
            request_waits = false;
            t.registers__request__valid = 0;
        }
    }
};

}  // namespace

#define EXPORT extern "C"

EXPORT Simulation *simulation_new(const DramTiming *timing, uint64_t stall_seed, uint32_t reset_seed) {
    return new Simulation(*timing, stall_seed, reset_seed);
}
EXPORT void simulation_delete(Simulation *simulation) { delete simulation; }
EXPORT const char *simulation_error(Simulation *simulation) { return simulation->error.c_str(); }
EXPORT uint64_t simulation_cycles(Simulation *simulation) { return simulation->cycles; }
EXPORT void simulation_resize(Simulation *simulation, uint64_t bytes) {
    simulation->dram.bytes.resize(bytes);
}
EXPORT uint8_t *simulation_memory(Simulation *simulation) { return simulation->dram.bytes.data(); }
EXPORT int simulation_access(Simulation *simulation, int write, uint32_t index, uint32_t data,
                             uint32_t *answer) {
    return simulation->access(write, index, data, answer);
}
EXPORT int simulation_run(Simulation *simulation, uint64_t limit) { return simulation->run(limit); }
EXPORT void simulation_log(Simulation *simulation, int logs) { simulation->logs = logs; }
EXPORT uint64_t simulation_log_length(Simulation *simulation) { return simulation->log.size(); }
EXPORT void simulation_take_log(Simulation *simulation, Stretch *target) {
    std::copy(simulation->log.begin(), simulation->log.end(), target);
    simulation->log.clear();
}
