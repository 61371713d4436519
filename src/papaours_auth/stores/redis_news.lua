-- The tips of some logs, and what each holds after a tip that is known. Nothing is written.
-- KEYS: changes of each partition, and where the store's own is among them, mark and peppers.
-- ARGV: how many entries at most, a known tip for each log ("" for none), the question's word.
-- Gives the word, then for each log {tip, minted only, entries}; entries is nil where the known tip is not in it, the whole
-- is nil where it is lost; minted only is "m" until a foreign key is added. After those, the installation and the peppers.
local logs = #ARGV - 2
local news = {ARGV[#ARGV]}
for place = 1, logs do
  local log = KEYS[place]
  local known, length, since = ARGV[place + 1], redis.call('LLEN', log), false
  if length == 0 then
    news[place + 1] = false
  else
    local last = redis.call('LINDEX', log, -1)
    local tip = string.match(last, '^%d+ %x+')
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
    news[place + 1] = {tip, string.match(last, '^%d+ %x+ %d+(m?)') or '', since}
  end
end
if #KEYS > logs then
  news[logs + 2] = redis.call('HGET', KEYS[logs + 1], 'installation')
  news[logs + 3] = redis.call('HGETALL', KEYS[logs + 2])
end
return news
