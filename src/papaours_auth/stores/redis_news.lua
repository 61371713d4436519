-- The tips of some logs, and what each holds after a tip that is known. Nothing is written.
-- KEYS: changes of each partition, and where theirs is among them, peppers.
-- ARGV: how many entries at most, and a known tip for each ("" for none).
-- Gives for each log {tip, entries}; entries is nil where the known tip is not in it, the whole is nil where it is lost.
-- After those, the peppers.
local news = {}
for place = 1, #ARGV - 1 do
  local log = KEYS[place]
  local known, length, since = ARGV[place + 1], redis.call('LLEN', log), false
  if length == 0 then
    news[place] = false
  else
    local tip = string.match(redis.call('LINDEX', log, -1), '^%d+ %x+')
    local seq = tonumber(string.match(known, '^%d+'))
    if known == tip then
      since = {}
    elseif seq and seq < length and length - seq <= tonumber(ARGV[1]) then
      -- The n-th change stands at n - 1: if what stands there is another one, this is another history.
      local entries = redis.call('LRANGE', log, seq - 1, -1)
      if string.match(entries[1], '^%d+ %x+') == known then
        table.remove(entries, 1)
        since = entries
      end
    end
    news[place] = {tip, since}
  end
end
if #KEYS == #ARGV then
  news[#ARGV] = redis.call('HGETALL', KEYS[#ARGV])
end
return news
