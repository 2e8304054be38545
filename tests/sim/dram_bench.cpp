// A client of the DRAM model that never waits: gives every command as soon as it is taken, and takes
// and gives a word each cycle. Word i of a write is its burst's number, i low bytes from it.

#include "dram.h"

struct Request { uint32_t writes, address, beats, start; };  // start: first cycle of its command
struct Times { uint32_t command, first, last; };  // cycles; `last` of a write is that of `written`

// Cycles that all requests took; 0 if that was more than `limit`.
extern "C" uint32_t run(const DramTiming *timing, uint8_t *bytes, uint64_t size, uint32_t count,
                        const Request *requests, Times *times, uint32_t limit) {
    Dram dram(*timing);
    dram.bytes.assign(bytes, bytes + size);
    std::deque<uint32_t> sent[2];  // bursts by number: read, written
    std::deque<uint32_t> filling;
    uint32_t next = 0, given = 0, taken = 0, complete = 0;
    for (uint32_t cycle = 0; cycle < limit; cycle++) {
        if (dram.has_word()) {
            const uint32_t number = sent[0].front();
            if (!taken)
                times[number].first = cycle;
            dram.take_word();
            if (++taken == requests[number].beats) {
                times[number].last = cycle;
                sent[0].pop_front(), taken = 0, complete++;
            }
        }
        if (dram.has_written()) {
            times[sent[1].front()].last = cycle;
            dram.take_written(), sent[1].pop_front(), complete++;
        }
        if (!filling.empty() && dram.takes_word()) {
            const uint32_t number = filling.front();
            if (!given)
                times[number].first = cycle;
            uint8_t word[64];
            std::memset(word, int(number + given), sizeof word);
            dram.give_word(word);
            if (++given == requests[number].beats)
                filling.pop_front(), given = 0;
        }
        if (next < count && cycle >= requests[next].start) {
            const Request &request = requests[next];
            if (request.writes ? dram.takes_write() : dram.takes_read()) {
                times[next].command = cycle;
                sent[request.writes].push_back(next);
                if (request.writes)
                    dram.write(request.address, request.beats), filling.push_back(next);
                else
                    dram.read(request.address, request.beats);
                next++;
            }
        }
        dram.advance();
        if (complete == count) {
            std::copy(dram.bytes.begin(), dram.bytes.end(), bytes);
            return cycle + 1;
        }
    }
    return 0;
}
