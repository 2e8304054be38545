// DRAM behind a memory port: contents, and when each word moves.
//
// Time is counted in clock cycles of the accelerator. The two directions share the DRAM's data bus;
// a read word arrives `read_latency` cycles after its turn on the bus, so latency costs no bandwidth.
// The parameters are those of sim/dram.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

struct DramTiming {
    uint32_t bus_bytes;
    uint32_t rate;  // 1/256 bytes per cycle on the data bus
    uint32_t read_latency;  // from a word's turn on the data bus to the port
    uint32_t write_latency;  // from the last word's turn to `written`
    uint32_t activate;  // opens a row
    uint32_t precharge;  // closes one
    uint32_t turnaround;  // between reading and writing
    uint32_t refresh_interval;  // 0: no refresh
    uint32_t refresh;  // how long one blocks everything
    uint32_t banks;
    uint32_t row_bytes;
};

class Dram {
public:
    static constexpr size_t COMMANDS = 4;  // bursts that wait in each direction
    static constexpr size_t WRITE_WORDS = 16;  // words that wait to be written
    static constexpr uint32_t RUN_WORDS = 64;  // before the other direction gets its turn

    std::vector<uint8_t> bytes;

    explicit Dram(const DramTiming &timing)
        : timing(timing), open_row(timing.banks, -1), bank_ready(timing.banks, 0),
          next_refresh(timing.refresh_interval) {
        // As many words as the latency keeps under way, and a burst to smooth refreshes.
        const uint64_t under_way = uint64_t(timing.rate) * timing.read_latency / (256 * timing.bus_bytes);
        read_words = under_way + 64;
    }

    bool takes_read() const { return reads.size() < COMMANDS; }
    bool takes_write() const { return writes.size() < COMMANDS; }
    bool takes_word() const { return waiting.size() < WRITE_WORDS; }
    bool has_word() const { return !arriving.empty() && arriving.front().due <= now; }
    bool has_written() const { return !finished.empty() && finished.front() <= now; }
    bool idle() const {
        return reads.empty() && writes.empty() && arriving.empty() && finished.empty();
    }

    void read(uint32_t address, uint32_t beats) { reads.push_back({address, beats}); changed = true; }
    void write(uint32_t address, uint32_t beats) { writes.push_back({address, beats}); changed = true; }
    void give_word(const void *source) {
        waiting.emplace_back();
        std::memcpy(waiting.back().data, source, timing.bus_bytes);
    }
    const uint8_t *word() const { return arriving.front().data; }
    void take_word() { arriving.pop_front(); }
    void take_written() { finished.pop_front(); }

    // One clock cycle: at most one word moves over the data bus.
    void advance() {
        now++;
        if (timing.refresh_interval && now >= next_refresh) {
            next_refresh += timing.refresh_interval;
            refreshes_due++;
        }
        if (busy_until > now)
            return;
        if (refreshes_due) {
            refreshes_due--;
            const bool open = std::any_of(open_row.begin(), open_row.end(),
                                          [](int64_t row) { return row >= 0; });
            busy_until = now + timing.refresh + (open ? timing.precharge : 0);
            std::fill(open_row.begin(), open_row.end(), -1);
            changed = true;
            return;
        }
        if (!choose_direction())
            return;
        auto &queue = writing ? writes : reads;
        if (changed)
            open_ahead(queue);
        Burst &burst = queue.front();
        const uint32_t bank = bank_of(burst.address);
        if (open_row[bank] != row_of(burst.address))
            open(bank, row_of(burst.address));
        if (bank_ready[bank] > now)
            return;
        credit += std::min(timing.rate, 256 * timing.bus_bytes);
        if (credit < 256 * timing.bus_bytes)
            return;
        credit -= 256 * timing.bus_bytes;
        move(burst);
        run++;
        if (burst.address % timing.row_bytes == 0)
            changed = true;
        if (!burst.beats) {
            if (writing)
                finished.push_back(now + timing.write_latency);
            queue.pop_front();
            changed = true;
        }
    }

private:
    struct Burst { uint32_t address, beats; };
    struct Word { uint64_t due; uint8_t data[128]; };

    DramTiming timing;
    uint64_t now = 0, busy_until = 0;
    std::vector<int64_t> open_row;
    std::vector<uint64_t> bank_ready;
    uint64_t next_refresh;
    uint32_t refreshes_due = 0;
    uint64_t credit = 0;  // 1/256 bytes that the data bus has moved of the present word
    uint32_t run = 0;  // words since the last change of direction
    bool writing = false;
    bool changed = false;  // since rows were opened ahead
    size_t read_words;
    std::deque<Burst> reads, writes;
    std::deque<Word> waiting, arriving;
    std::deque<uint64_t> finished;

    uint32_t bank_of(uint32_t address) const { return address / timing.row_bytes % timing.banks; }
    int64_t row_of(uint32_t address) const { return address / timing.row_bytes / timing.banks; }

    bool can_read() const { return !reads.empty() && arriving.size() < read_words; }
    bool can_write() const { return !writes.empty() && !waiting.empty(); }

    // Whether the present direction may move a word; starts a turnaround where the other should.
    bool choose_direction() {
        const bool here = writing ? can_write() : can_read();
        // A write begins when a good part of it is there, or nothing else is to be done.
        const bool there = writing ? can_read()
            : can_write() && (!here || waiting.size() >= std::min<size_t>(writes.front().beats,
                                                                          WRITE_WORDS / 2));
        if (there && (!here || run >= RUN_WORDS)) {
            writing = !writing;
            run = 0;
            changed = true;
            busy_until = now + timing.turnaround;
            return !timing.turnaround;
        }
        return here;
    }

    void open(uint32_t bank, int64_t row) {
        bank_ready[bank] = now + timing.activate + (open_row[bank] >= 0 ? timing.precharge : 0);
        open_row[bank] = row;
    }

    // The rows that come next are opened meanwhile, where their banks are not in use.
    void open_ahead(const std::deque<Burst> &queue) {
        changed = false;
        uint64_t used = uint64_t(1) << bank_of(queue.front().address);
        for (const Burst &burst : queue) {
            const uint32_t last = burst.address + (burst.beats - 1) * timing.bus_bytes;
            for (uint32_t row = burst.address / timing.row_bytes; row <= last / timing.row_bytes; row++) {
                const uint32_t bank = row % timing.banks;
                if (!(used >> bank & 1) && open_row[bank] != row / timing.banks)
                    open(bank, row / timing.banks);
                used |= uint64_t(1) << bank;
            }
        }
    }

    void move(Burst &burst) {
        uint8_t *place = bytes.data() + burst.address;
        if (writing) {
            std::memcpy(place, waiting.front().data, timing.bus_bytes);
            waiting.pop_front();
        } else {
            arriving.emplace_back();
            arriving.back().due = now + timing.read_latency;
            std::memcpy(arriving.back().data, place, timing.bus_bytes);
        }
        burst.address += timing.bus_bytes;
        burst.beats--;
    }
};
