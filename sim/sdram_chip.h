// An SDRAM chip at its pins, which checks every timing rule: the C++ twin of sdram_model.py.
#pragma once

#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <vector>

// The fields that `moeware.sim.board_device.ChipRules` passes, in its order.
struct ChipRules {
    double period_ns, rcd_ns, rp_ns, ras_ns, ras_max_ns, rc_ns, rfc_ns, rrd_ns, wr_ns;
    double power_up_ns, refresh_interval_ns, cas2_ns;
    uint32_t wr_cycles, mode_cycles, power_up_refreshes, bank_bits, row_bits, column_bits;
    uint32_t capture_cycles;
};

struct ChipPins {
    bool clock_enable, cs, ras, cas, we, dq_oe;
    uint32_t bank, address, dqm;
    uint16_t dq_o;
};

class SDRAMChip {
  public:
    std::vector<uint16_t> cells;  // by bank, row, column from the top: row, bank, column
    uint64_t cycle = 0;

    explicit SDRAMChip(const ChipRules &rules)
        : cells(size_t(1) << (rules.bank_bits + rules.row_bits + rules.column_bits), 0xDEAD),
          rules(rules) {
        activated.fill(NEVER);
        precharged.fill(NEVER);
        last_word.fill(NEVER);
        open_row.fill(CLOSED);
        output_edge.fill(NO_EDGE);
    }

    // One rising edge of the chip's clock with these pins. Returns dq_i of the cycle that follows,
    // or where the chip has two clocks in a cycle, the part of it that belongs to this one.
    // Throws std::runtime_error naming the rule that was broken.
    uint16_t step(const ChipPins &pins) {
        now = cycle * rules.period_ns;
        if (pins.clock_enable && pins.cs) execute(pins);
        if (words_left) write_column(pins);
        if (counting) {
            double owed = (now - counted_from) / rules.refresh_interval_ns - refreshes;
            require(owed <= 8, "refresh interval: %.1f refreshes behind", owed);
        }
        if (pins.dq_oe)
            require(!output_at(cycle) && !(cycle && output_at(cycle - 1)),
                    "bus contention: the chip still drives DQ");
        uint64_t sampled = cycle + 3 - rules.capture_cycles;
        uint16_t value = output_at(sampled) ? output_word[sampled % OUTPUTS] : 0xBAD0;
        ++cycle;
        return value;
    }

  private:
    static constexpr double NEVER = -std::numeric_limits<double>::infinity();
    static constexpr int64_t CLOSED = -1;
    static constexpr size_t BANKS = 4, OUTPUTS = 32;
    static constexpr uint64_t NO_EDGE = ~uint64_t(0);

    ChipRules rules;
    double now = 0, refreshed = NEVER, mode_set = NEVER, counted_from = 0, latest_activate = NEVER;
    std::array<int64_t, BANKS> open_row;
    std::array<double, BANKS> activated, precharged, last_word;
    std::array<uint64_t, BANKS> read_end{};
    std::array<uint64_t, OUTPUTS> output_edge;  // ring by edge: at which edge the word is valid
    std::array<uint16_t, OUTPUTS> output_word{};
    uint32_t refreshes = 0, latency = 0, burst = 0, words_left = 0, writing_bank = 0;
    size_t writing_cell = 0;
    bool counting = false;

    void require(bool condition, const char *rule, ...) const {
        if (condition) return;
        char text[160], message[200];
        va_list arguments;
        va_start(arguments, rule);
        vsnprintf(text, sizeof text, rule, arguments);
        va_end(arguments);
        snprintf(message, sizeof message, "SDRAM at cycle %llu: %s", (unsigned long long)cycle, text);
        throw std::runtime_error(message);
    }

    void elapsed(double since, double least_ns, const char *rule) const {
        require(now - since >= least_ns - 1e-3, "%s: %g ns, not %g", rule, now - since, least_ns);
    }

    bool output_at(uint64_t edge) const { return output_edge[edge % OUTPUTS] == edge; }

    void execute(const ChipPins &pins) {
        int strobes = pins.ras << 2 | pins.cas << 1 | pins.we;
        if (strobes == 0b000) return;
        elapsed(0, rules.power_up_ns, "command before the end of power-up");
        elapsed(refreshed, rules.rfc_ns, "tRFC");
        elapsed(mode_set, rules.mode_cycles * rules.period_ns, "tMRD");
        bool precharge = strobes == 0b101, activate = strobes == 0b100;
        require(!words_left || precharge || activate, "command cuts a write burst short");
        switch (strobes) {
            case 0b100: return do_activate(pins.bank, pins.address);
            case 0b101: return do_precharge(pins.bank, pins.address >> 10 & 1);
            case 0b110: return do_refresh();
            case 0b111: return do_set_mode(pins.bank, pins.address);
            case 0b010: return do_read(pins.bank, pins.address);
            case 0b011: return do_write(pins.bank, pins.address);
            default: require(false, "no such command: %d", strobes);
        }
    }

    void do_activate(uint32_t bank, uint32_t row) {
        require(latency, "ACTIVATE before SET MODE");
        require(open_row[bank] == CLOSED, "ACTIVATE of open bank %u", bank);
        elapsed(precharged[bank], rules.rp_ns, "tRP before ACTIVATE");
        elapsed(activated[bank], rules.rc_ns, "tRC before ACTIVATE");
        elapsed(latest_activate, rules.rrd_ns, "tRRD before ACTIVATE");
        open_row[bank] = row;
        activated[bank] = latest_activate = now;
    }

    void do_precharge(uint32_t bank, bool every) {
        for (uint32_t b = 0; b < BANKS; ++b) {
            if ((!every && b != bank) || open_row[b] == CLOSED) continue;
            elapsed(activated[b], rules.ras_ns, "tRAS before PRECHARGE");
            require(now - activated[b] <= rules.ras_max_ns, "tRAS, the longest");
            elapsed(last_word[b], rules.wr_ns, "tWR before PRECHARGE");
            elapsed(last_word[b], rules.wr_cycles * rules.period_ns, "tWR before PRECHARGE");
            require(!words_left || writing_bank != b, "PRECHARGE cuts a write burst short");
            require(cycle >= read_end[b], "PRECHARGE cuts a read burst short");
            open_row[b] = CLOSED;
            precharged[b] = now;
        }
    }

    void require_idle(const char *command) const {
        for (int64_t row : open_row) require(row == CLOSED, "%s with an open row", command);
    }

    void do_refresh() {
        require_idle("REFRESH");
        for (double time : precharged) elapsed(time, rules.rp_ns, "tRP before REFRESH");
        elapsed(latest_activate, rules.rc_ns, "tRC before REFRESH");
        refreshed = now;
        ++refreshes;
    }

    void do_set_mode(uint32_t bank, uint32_t mode) {
        require_idle("SET MODE");
        require(refreshes >= rules.power_up_refreshes, "SET MODE before REFRESH");
        latency = mode >> 4 & 7;
        burst = 1u << (mode & 7);
        require(burst <= 8 && !(mode & ~0x77u) && bank == 0, "mode %#x", mode);
        require(latency == 3 || (latency == 2 && rules.period_ns >= rules.cas2_ns - 1e-3),
                "CAS latency %u at a period of %g ns", latency, rules.period_ns);
        mode_set = counted_from = now;
        counting = true;
        refreshes = 0;
    }

    size_t first_cell(uint32_t bank, uint32_t column) const {
        require(open_row[bank] != CLOSED, "access to closed bank %u", bank);
        elapsed(activated[bank], rules.rcd_ns, "tRCD before access");
        require(!(column >> rules.column_bits) && column % burst == 0, "column address %#x", column);
        return (size_t(open_row[bank]) << rules.bank_bits | bank) << rules.column_bits | column;
    }

    void do_read(uint32_t bank, uint32_t column) {
        size_t cell = first_cell(bank, column);
        for (uint32_t i = 0; i < burst; ++i) {
            uint64_t edge = cycle + latency + i;
            require(!output_at(edge), "READ cuts a read burst short");
            output_edge[edge % OUTPUTS] = edge;
            output_word[edge % OUTPUTS] = cells[cell + i];
        }
        read_end[bank] = cycle + burst;
    }

    void do_write(uint32_t bank, uint32_t column) {
        writing_cell = first_cell(bank, column);
        writing_bank = bank;
        words_left = burst;
    }

    void write_column(const ChipPins &pins) {
        require(pins.dq_oe, "no data on DQ during a write burst");
        uint16_t keep = (pins.dqm & 1 ? 0x00FF : 0) | (pins.dqm & 2 ? 0xFF00 : 0);
        cells[writing_cell] = (cells[writing_cell] & keep) | (pins.dq_o & ~keep);
        ++writing_cell;
        last_word[writing_bank] = now;
        --words_left;
    }
};
